"""Log-probs of an output layer without all of its logits at once, and their gradients.

CPUs have kernels for a whole head and one id a token (_native/head.py). Everything else works in tiles: a library
product into a buffer, then the row kernels on it while it is in the cache. A tile holds the logits of some tokens and
part of the vocabulary. Forward merges the softmax of a token's tiles; backward recomputes a tile and overwrites it with
its gradient. Scratch memory is one tile for any number of tokens and any vocabulary. If all logits are few enough, they
are kept instead, which saves one of four products.

Logits are float32, for 16-bit inputs too, unless the head rounds them as its own layer does.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prime_kernels import _backends, _tuning
from prime_kernels._backends import GradientKernel, HeadGradients, LinearHead, RowGradient, RowResults
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _fused_tiles
from prime_kernels.ops._softcap import row_kernels

# Backends with kernels for a whole head. Of the sizes below they use KEPT_BYTES alone.
HEAD_KERNELS = frozenset({"cpu"})
# Tokens per tile, by device: enough for a product at full speed.
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits in memory at once, by device. Forward needs them in the cache; backward gains from larger tiles, with fewer
# roundings of 16-bit partial sums and larger products.
# On GPUs 8,192 tokens by 16,896 columns: products of 128 x 256 then fill whole waves of an H100's 132 multiprocessors,
# where 16,384 columns would leave a last wave of four.
FORWARD_ELEMENTS = {"cpu": 2**22, "cuda": 8192 * 16896}
BACKWARD_ELEMENTS = {"cpu": 2**24, "cuda": 8192 * 2 * 16896}
# Logits kept from forward to backward, at most, in bytes, by device.
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**29}
# Rows of logits start at multiples of 16 bytes: vector loads are possible for any vocabulary, and a tile gives the same
# bits at any position.
ALIGNED_COLUMNS = 8
# Least size of tiles over the whole vocabulary. The gradient of the head is summed over them: the fewer the better.
FUSED_BYTES = 2**27
# Rows of a 16-bit product that is added to a float32 sum, by device: enough for full speed, small next to the sum.
ADDED_ROWS = {"cpu": 2**12, "cuda": 2**14}


def forward_elements(device_type: str) -> int:
    """Logits of a tile without gradients."""
    return _tuning.tile("forward_elements", device_type, FORWARD_ELEMENTS[device_type])


def backward_elements(device_type: str) -> int:
    """Logits of a tile that is computed again for its gradient."""
    return _tuning.tile("backward_elements", device_type, BACKWARD_ELEMENTS[device_type])


def fused_bytes(device_type: str) -> int:
    """Size of a tile over the whole vocabulary, unless there is too little memory for it."""
    default = FUSED_BYTES if device_type == "cpu" else _fused_tiles.size_on_gpu(FUSED_BYTES)
    return _tuning.tile("fused_bytes", device_type, default)


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def tile_shape(elements: int, n_tokens: int, vocabulary: int, most_tokens: int) -> tuple[int, int]:
    """(tokens, columns) of a tile of at most ``elements`` logits; more tokens where it holds the whole vocabulary."""
    tokens = max(1, min(n_tokens, most_tokens))
    columns = max(1, min(vocabulary, elements // tokens))
    if ALIGNED_COLUMNS < columns < vocabulary:
        columns -= columns % ALIGNED_COLUMNS
    if columns == vocabulary:
        tokens = max(1, min(n_tokens, elements // columns))
    return tokens, columns


def tokens_of_whole_rows(elements: int, n_tokens: int, vocabulary: int) -> int:
    """Tokens of a tile of at most ``elements`` logits over the whole vocabulary: as few tiles as go, of one size."""
    count = max(1, -(-n_tokens // max(1, elements // vocabulary)))
    return max(1, -(-n_tokens // count))


class Tiles:
    """Products of tokens [N, D] with parts of a head [V, D], all in one buffer of bounded size."""

    def __init__(self, head: LinearHead, elements: int, *, whole_rows: bool = False) -> None:
        self.head, self.dtype = head, logits_dtype(head)
        n_tokens, vocabulary = len(head.hidden), len(head.weight)
        if whole_rows:
            self.tokens, self.columns = tokens_of_whole_rows(elements, n_tokens, vocabulary), vocabulary
        else:
            self.tokens, self.columns = tile_shape(elements, n_tokens, vocabulary, TOKENS[_kind(head.hidden)])
        self.buffer: Tensor | None = None

    def token_spans(self) -> Iterator[slice]:
        return spans(len(self.head.hidden), self.tokens)

    def column_spans(self) -> Iterator[slice]:
        return spans(len(self.head.weight), self.columns)

    def logits(self, tokens: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """The tile [tokens, columns], in the dtype of the head's logits."""
        hidden, weight, bias = self.head.hidden[tokens], self.head.weight[columns], self.head.bias
        if out is None:
            if self.buffer is None:
                self.buffer = hidden.new_empty(self.tokens * _aligned(self.columns), dtype=self.dtype)
            width = _aligned(len(weight))
            out = self.buffer[: len(hidden) * width].view(len(hidden), width)[:, : len(weight)]
        if self.dtype == hidden.dtype and bias is not None:
            return torch.addmm(bias[columns], hidden, weight.T, out=out)
        _product(hidden, weight.T, out)
        return out if bias is None else out.add_(bias[columns])

    def for_gradient(self, logits: Tensor, wide: bool) -> Tensor:
        """Where to write the gradient of a tile: a new tensor of the products' dtype, or the logits themselves.

        The latter if they have that dtype, or the gradient is wanted in theirs (``wide``).

        A new one takes half the memory of float32 logits besides. It could also be written over the front of each row,
        with one program for a whole row and a barrier between each block's loads and stores: that saves no time, only
        two of six bytes.
        """
        hidden = self.head.hidden
        if wide or logits.dtype == hidden.dtype:
            return logits
        rows, columns = logits.shape
        return hidden.new_empty(rows, _aligned(columns))[:, :columns]


def logits_dtype(head: LinearHead) -> torch.dtype:
    return head.hidden.dtype if head.rounded else result_dtype(head.hidden)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` to ``out``, of their dtype or float32. On GPUs the accumulators of a 16-bit product are not rounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif _kind(a) == "cuda":
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def can_keep(head: LinearHead, backend: str) -> bool:
    """Whether all logits are few enough to keep for backward."""
    item = 4 if backend in HEAD_KERNELS else logits_dtype(head).itemsize
    return len(head.hidden) * len(head.weight) * item <= KEPT_BYTES[_kind(head.hidden)]


def _all_logits(head: LinearHead) -> Tensor:
    """An uninitialised buffer for all logits [N, V]."""
    n_tokens, vocabulary = len(head.hidden), len(head.weight)
    return head.hidden.new_empty(n_tokens, _aligned(vocabulary), dtype=logits_dtype(head))[:, :vocabulary]


def all_logits(head: LinearHead, backend: str) -> Tensor:
    """All logits [N, V], capped and not divided by the temperature."""
    if backend in HEAD_KERNELS:
        return _backends.head(backend).logits(head)
    z = head.hidden.new_empty(len(head.hidden), len(head.weight), dtype=logits_dtype(head))
    _product(head.hidden, head.weight.T, z)
    z = z if head.bias is None else z.add_(head.bias)
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def join(parts: Sequence[RowResults], owner: Tensor) -> RowResults:
    """Results of whole rows from those of parts of their vocabulary; ``owner`` [N] is the part with the target."""
    if len(parts) == 1:
        return parts[0]
    logp, lse = (torch.stack(columns).double() for columns in zip(*(part[:2] for part in parts), strict=True))
    total = lse.logsumexp(0)
    own_logp, own_lse = (column.gather(0, owner.unsqueeze(0)).squeeze(0) for column in (logp, lse))
    others = lse.scatter(0, owner.unsqueeze(0), -torch.inf).logsumexp(0)
    # Relative to the target's own part, so that a log-probability near 0 keeps its digits. In a part with nothing but
    # -inf, logp is NaN and the tokens have probability 0.
    joined = own_logp - torch.nn.functional.softplus(others - own_lse)
    impossible = (own_lse == -torch.inf) & (total > -torch.inf)
    joined = joined.masked_fill(impossible, -torch.inf)
    entropies = [part.entropy for part in parts if part.entropy is not None]
    entropy = None
    if entropies:
        log_share = lse - total
        share = log_share.exp()
        terms = share * (torch.stack(entropies).double() - log_share)
        # 0 * total is NaN where total is NaN or infinite and the row has no distribution.
        entropy = (terms.where(share > 0, 0.0).sum(0) + 0.0 * total).float()
    return RowResults(joined.float(), total.float(), entropy)


def head_log_probs(
    head: LinearHead, with_entropy: bool, backend: str, keep: bool = False
) -> tuple[RowResults, Tensor | None]:
    """Results [N] and, with ``keep``, the logits for :func:`head_gradients`.

    For ids outside the head logp is meaningless. The results are bitwise the same with and without ``keep``.
    """
    if backend in HEAD_KERNELS:
        return _backends.head(backend).token_log_probs(head, with_entropy, keep)
    kernels = row_kernels(backend, head.softcap)
    tiles = Tiles(head, forward_elements(_kind(head.hidden)))
    kept = _all_logits(head) if keep else None
    blocks = []
    for tokens in tiles.token_spans():
        parts = []
        for columns in tiles.column_spans():
            z = tiles.logits(tokens, columns, None if kept is None else kept[tokens, columns])
            inside = (head.ids[tokens] - columns.start).clamp(0, z.shape[1] - 1)
            found = kernels.token_log_probs([z], inside, None, [head.temperature], with_entropy)
            parts.append(found.only_model())
        last = -(-len(head.weight) // tiles.columns) - 1
        blocks.append(join(parts, (head.ids[tokens] // tiles.columns).clamp(0, last)))
    return RowResults.cat(blocks, 0), kept


def head_gradients(
    head: LinearHead,
    gradient: RowGradient,
    wanted: Sequence[bool],
    backend: str,
    kept: Tensor | None = None,
    kernels: GradientKernel | None = None,
) -> HeadGradients:
    """Gradients of hidden, weight and bias where ``wanted``. Ids may lie outside the head.

    ``kept`` are the logits of :func:`head_log_probs`, which may be overwritten. ``kernels`` stands for those of the
    backend where a token has several ids.
    """
    if kernels is None and backend in HEAD_KERNELS:
        return _backends.head(backend).gradients(head, gradient, wanted, kept)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    kernels = kernels or row_kernels(backend, head.softcap)
    elements = backward_elements(_kind(hidden)) * hidden.element_size() // logits_dtype(head).itemsize
    if kept is None and can_keep(head, backend):
        kept = _recompute(head)
    if kept is not None:
        elements = len(hidden) * len(weight)
    tiles = Tiles(head, elements)
    one_column_span, one_token_span = tiles.columns >= len(weight), tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=one_column_span) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    for columns in tiles.column_spans():
        part = None if grad_weight is None else Sum(grad_weight[columns], once=one_token_span, into=True)
        bias_part: Tensor | None = None
        for tokens in tiles.token_spans():
            z = tiles.logits(tokens, columns) if kept is None else kept
            of_rows, inside = gradient.rows(tokens), head.ids[tokens] - columns.start
            dz = tiles.for_gradient(z, wide=grad_bias is not None)
            kernels.logits_gradient(z, inside, None, of_rows, head.temperature, dz, partial=True)
            if grad_bias is not None:
                of_tokens = dz.sum(0, dtype=torch.float32)
                bias_part = of_tokens if bias_part is None else bias_part + of_tokens
            dz = dz.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden.add(dz, weight[columns], tokens)
            if part is not None:
                part.add(dz.T, hidden[tokens])
            del z, dz  # before the next product
        if grad_weight is not None and part is not None and not part.once:
            grad_weight[columns] = part.total
        part = None  # before the next one is made
        if grad_bias is not None and bias_part is not None:
            grad_bias[columns] = bias_part.to(grad_bias.dtype)
    of_hidden = None if grad_hidden is None else grad_hidden.total.to(hidden.dtype)
    return HeadGradients(of_hidden, grad_weight, grad_bias)


def _recompute(head: LinearHead) -> Tensor:
    """The logits that head_log_probs would have kept, by the same tiles: equal bits, hence equal gradients."""
    tiles, logits = Tiles(head, forward_elements(_kind(head.hidden))), _all_logits(head)
    for tokens in tiles.token_spans():
        for columns in tiles.column_spans():
            tiles.logits(tokens, columns, logits[tokens, columns])
    return logits


def loss_gradients(
    head: LinearHead, grad_of: Callable[[Tensor, slice], Tensor], wanted: Sequence[bool], backend: str
) -> tuple[Tensor, HeadGradients]:
    """logp and the gradients from one product, for losses of which a token's gradient follows from its logp.

    ``grad_of(logp, tokens)`` is d loss / d logp of a span of tokens. Not for HEAD_KERNELS.
    """
    hidden, weight, bias = head.hidden, head.weight, head.bias
    kernels = row_kernels(backend, head.softcap)
    itemsize = logits_dtype(head).itemsize
    all_bytes = len(hidden) * len(weight) * itemsize
    size = _fused_tiles.fitting(fused_bytes(_kind(hidden)), all_bytes, hidden.device, FUSED_BYTES)
    tiles = Tiles(head, size // itemsize, whole_rows=True)
    columns = slice(0, len(weight))
    one = tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=True) if wanted[0] else None
    grad_weight = Sum(weight, once=one) if wanted[1] else None
    grad_bias = (
        torch.zeros(len(weight), dtype=torch.float32, device=hidden.device) if bias is not None and wanted[2] else None
    )
    parts = []
    for tokens in tiles.token_spans():
        z = tiles.logits(tokens, columns)
        logp, lse, _ = kernels.token_log_probs([z], head.ids[tokens], None, [head.temperature], False).only_model()
        parts.append(logp)
        if not any(wanted):
            continue
        gradient = RowGradient(lse, None, grad_of(logp, tokens), None)
        dz = tiles.for_gradient(z, wide=grad_bias is not None)
        kernels.logits_gradient(z, head.ids[tokens], None, gradient, head.temperature, dz)
        if grad_bias is not None:
            grad_bias += dz.sum(0, dtype=torch.float32)
        dz = dz.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden.add(dz, weight, tokens)
        if grad_weight is not None:
            grad_weight.add(dz.T, hidden[tokens])
        del z, dz  # before the next product
    del tiles  # before the sums are rounded, which takes memory too
    of_hidden, of_weight = (
        None if sums is None else sums.total.to(hidden.dtype) for sums in (grad_hidden, grad_weight)
    )
    of_bias = None if grad_bias is None else grad_bias.to(hidden.dtype)
    return torch.cat(parts), HeadGradients(of_hidden, of_weight, of_bias)


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


class Sum:
    """A sum of products: written directly if there is one term, else accumulated in float32.

    A 16-bit sum would lose small terms. A single term is written to a tensor like ``like``, or with ``into`` to it.
    """

    def __init__(self, like: Tensor, *, once: bool, into: bool = False) -> None:
        self.once = once
        if once:
            self.total = like if into else torch.empty_like(like)
        else:
            self.total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def add(self, a: Tensor, b: Tensor, rows: slice = slice(None)) -> None:
        """Add ``a @ b`` to these rows."""
        at = self.total[rows]
        if self.once:
            torch.mm(a, b, out=at)
        elif a.dtype == torch.float32:
            at.addmm_(a, b)
        elif _fused_tiles.sums_in_product(_kind(a)):
            _fused_tiles.add_product(at, a, b)
        else:
            for block in spans(len(a), ADDED_ROWS[_kind(a)]):
                at[block].add_(a[block] @ b)
