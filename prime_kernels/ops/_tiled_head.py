"""Log-probs of an output layer without all of its logits at once, and their gradients.

CPUs have kernels for a whole head and one id a token (_native/head.py). Everything else works in tiles: a library
product into a buffer, then the row kernels on it while it is in the cache. A tile holds the logits of some tokens and
part of the vocabulary. Forward merges the softmax of a token's tiles; backward recomputes a tile and overwrites it with
its gradient. Scratch memory is one tile for any number of tokens and any vocabulary. If all logits are few enough, they
are kept instead, which saves one of four products: the tiles of backward are then parts of what is kept. They have the
same shapes either way, and what is computed again comes from the products of forward: the gradients have the same bits.

With "fused_columns" in a tuning file "triton" multiplies itself and takes the softmax of a tile while it is in
registers; what a gradient needs, probabilities or logits, the same kernel writes (_fused_product).

Logits are float32, for 16-bit inputs too, unless the head rounds them as its own layer does.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from prime_kernels import _backends, _tuning
from prime_kernels._backends import GradientKernel, HeadGradients, LinearHead, RowGradient, RowResults
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _fused_product, _fused_tiles
from prime_kernels.ops._fused_tiles import Sum, kind_of
from prime_kernels.ops._softcap import row_kernels
from prime_kernels.ops._tile_shapes import aligned, moved, spans, tile_shape, tokens_of_whole_rows, up_to, whole_tiles

# What a forward pass keeps for head_gradients: nothing, all logits [N, V], or what _fused_product has instead.
Kept = tuple[Tensor, ...]

# Backends with kernels for a whole head. Of the sizes below they use kept_bytes alone.
HEAD_KERNELS = frozenset({"cpu"})
# Tokens per tile, by device: enough for a product at full speed.
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits in memory at once, by device. Forward needs them in the cache; backward gains from larger tiles, with fewer
# roundings of 16-bit partial sums and larger products.
# On GPUs 8,192 tokens by 16,896 columns: products of 128 x 256 then fill whole waves of an H100's 132 multiprocessors,
# where 16,384 columns would leave a last wave of four.
FORWARD_ELEMENTS = {"cpu": 2**22, "cuda": 8192 * 16896}
BACKWARD_ELEMENTS = {"cpu": 2**24, "cuda": 8192 * 2 * 16896}
# Logits kept from forward to backward, at most, in bytes, by device; on a GPU at least, see kept_bytes.
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**29}
# Least size of tiles over the whole vocabulary. The gradient of the head is summed over them: the fewer the better.
FUSED_BYTES = 2**27


def forward_elements(device_type: str) -> int:
    """Logits of a tile without gradients."""
    return _tuning.tile("forward_elements", device_type, FORWARD_ELEMENTS[device_type])


def backward_elements(device_type: str) -> int:
    """Logits of a tile that is computed again for its gradient."""
    return _tuning.tile("backward_elements", device_type, BACKWARD_ELEMENTS[device_type])


def kept_bytes(device_type: str) -> int:
    """All logits of a call that are kept for their gradient, at most.

    On a GPU a sixteenth of its memory, as a tile of a fused loss takes at the same moment; see :func:`can_keep`.
    """
    least = KEPT_BYTES[device_type]
    return _tuning.tile("kept_bytes", device_type, least if device_type == "cpu" else _fused_tiles.size_on_gpu(least))


def fused_bytes(device_type: str) -> int:
    """Size of a tile over the whole vocabulary, unless there is too little memory for it."""
    default = FUSED_BYTES if device_type == "cpu" else _fused_tiles.size_on_gpu(FUSED_BYTES)
    return _tuning.tile("fused_bytes", device_type, default)


def forward_tile(device_type: str, n_tokens: int, vocabulary: int) -> tuple[int, int]:
    """(tokens, columns) of a tile of a pass without gradients."""
    return tile_shape(forward_elements(device_type), n_tokens, vocabulary, TOKENS[device_type])


def backward_tile(
    device_type: str, input_bytes: int, logit_bytes: int, n_tokens: int, vocabulary: int
) -> tuple[int, int]:
    """(tokens, columns) of a tile of gradients, as many bytes of logits for any of their dtypes."""
    elements = max(forward_elements(device_type), backward_elements(device_type) * input_bytes // logit_bytes)
    sizes = tile_shape(elements, n_tokens, vocabulary, TOKENS[device_type])
    return whole_tiles(forward_tile(device_type, n_tokens, vocabulary), sizes, n_tokens, vocabulary)


class Tiles:
    """Products of tokens [N, D] with parts of a head [V, D], all in one buffer of bounded size."""

    def __init__(self, head: LinearHead, tokens: int, columns: int) -> None:
        self.head, self.dtype, self.tokens, self.columns = head, logits_dtype(head), tokens, columns
        self.buffer: Tensor | None = None
        self.fused: int | None = None
        """See _fused_product; None for a library's product."""

    @classmethod
    def forward(cls, head: LinearHead) -> Self:
        """Of a pass without gradients."""
        return cls(head, *forward_tile(kind_of(head.hidden), len(head.hidden), len(head.weight)))

    @classmethod
    def backward(cls, head: LinearHead) -> Self:
        """Of gradients: whole tiles of :meth:`forward`."""
        sizes = (head.hidden.element_size(), logits_dtype(head).itemsize)
        return cls(head, *backward_tile(kind_of(head.hidden), *sizes, len(head.hidden), len(head.weight)))

    @classmethod
    def of_whole_rows(cls, head: LinearHead, elements: int) -> Self:
        """Of at most ``elements`` logits over the whole vocabulary."""
        return cls(head, tokens_of_whole_rows(elements, len(head.hidden), len(head.weight)), len(head.weight))

    def token_spans(self) -> Iterator[slice]:
        return spans(len(self.head.hidden), self.tokens)

    def column_spans(self) -> Iterator[slice]:
        return spans(len(self.head.weight), self.columns)

    def logits(self, tokens: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """The tile [tokens, columns], in the dtype of the head's logits."""
        hidden, weight, bias = self.head.hidden[tokens], self.head.weight[columns], self.head.bias
        if out is None:
            out = self.empty(len(hidden), len(weight))
        if self.fused is not None:
            return _fused_product.logits(self.head, tokens, columns, self.fused, out)
        if self.dtype == hidden.dtype and bias is not None:
            return torch.addmm(bias[columns], hidden, weight.T, out=out)
        _product(hidden, weight.T, out)
        return out if bias is None else out.add_(bias[columns])

    def logits_by(self, parts: "Tiles", tokens: slice, columns: slice) -> Tensor:
        """The tile [tokens, columns] from the products of smaller tiles."""
        z = self.empty(tokens.stop - tokens.start, columns.stop - columns.start)
        for rows in spans(len(z), parts.tokens):
            for part in spans(z.shape[1], parts.columns):
                parts.logits(moved(rows, tokens.start), moved(part, columns.start), z[rows, part])
        return z

    def empty(self, n_tokens: int, n_columns: int) -> Tensor:
        """The buffer as a tile of this shape, with whatever is in it."""
        if self.buffer is None:
            self.buffer = self.head.hidden.new_empty(self.tokens * aligned(self.columns), dtype=self.dtype)
        width = aligned(n_columns)
        return self.buffer[: n_tokens * width].view(n_tokens, width)[:, :n_columns]

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
        return hidden.new_empty(rows, aligned(columns))[:, :columns]


def logits_dtype(head: LinearHead) -> torch.dtype:
    return head.hidden.dtype if head.rounded else result_dtype(head.hidden)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` to ``out``, of their dtype or float32. On GPUs the accumulators of a 16-bit product are not rounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif kind_of(a) == "cuda":
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def gradient_columns(head: LinearHead, backend: str) -> int | None:
    """Columns of a tile where gradients are made of probabilities; None where they are made of logits."""
    return _fused_product.for_gradient(head, backend, kind_of(head.hidden))


def can_keep(head: LinearHead, backend: str, tile_columns: int | None = None) -> bool:
    """Whether all logits, or with :func:`gradient_columns` probabilities, are few enough to keep for backward.

    On a GPU they leave two thirds of the free memory, unless they are very few: what else a step needs until then, and
    the gradients of hidden states and head. Results do not depend on it.
    """
    item, kind = 4 if backend in HEAD_KERNELS else logits_dtype(head).itemsize, kind_of(head.hidden)
    size = len(head.hidden) * len(head.weight) * (2 if tile_columns else item)
    return size <= kept_bytes(kind) and _fused_tiles.fitting(size, size, head.hidden.device, KEPT_BYTES[kind]) >= size


def empty_logits(head: LinearHead, tile_columns: int | None = None) -> Tensor | None:
    """An uninitialised buffer to keep all logits [N, V], or probabilities as :func:`can_keep` has them.

    None if the free memory is in pieces too small for it.
    """
    n_tokens, vocabulary = len(head.hidden), len(head.weight)
    try:
        if tile_columns:
            return _fused_product.empty_q(head, n_tokens, vocabulary, tile_columns)
        return head.hidden.new_empty(n_tokens, aligned(vocabulary), dtype=logits_dtype(head))[:, :vocabulary]
    except torch.OutOfMemoryError:
        return None


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


def spent(ctx: Any, kept: Kept) -> Kept:
    """What was kept for the first backward pass of a graph, which may overwrite it unseen by autograd."""
    kept, ctx.spent = () if ctx.spent else tuple(each.data for each in kept), True
    return kept


def head_log_probs(
    head: LinearHead, with_entropy: bool, backend: str, keep: bool = False, tile_columns: int | None = None
) -> tuple[RowResults, Kept]:
    """Results [N] and, with ``keep``, what :func:`head_gradients` needs, if there is memory for it.

    With :func:`gradient_columns` no id may lie outside the head; else logp is meaningless for those that do. The
    results are bitwise the same with and without ``keep``.
    """
    if backend in HEAD_KERNELS:
        results, logits = _backends.head(backend).token_log_probs(head, with_entropy, keep)
        return results, () if logits is None else (logits,)
    kept = empty_logits(head, tile_columns) if keep else None
    if kept is not None and tile_columns:
        return _fused_product.log_probs_and_kept(head, with_entropy, tile_columns, kept)
    fused = _fused_product.columns(head, backend, kind_of(head.hidden))
    if fused is not None:
        return _fused_product.log_probs(head, with_entropy, fused, kept), () if kept is None else (kept,)
    kernels, tiles = row_kernels(backend, head.softcap), Tiles.forward(head)
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
    return RowResults.cat(blocks, 0), () if kept is None else (kept,)


class OfLogits:
    """Gradients of tiles of logits, from those that were kept or new ones.

    ``kernels`` stands for those of the backend where a token has several ids; forward has these from library products.
    """

    def __init__(
        self,
        head: LinearHead,
        gradient: RowGradient,
        backend: str,
        wide: bool,
        kept: Kept,
        kernels: GradientKernel | None,
    ) -> None:
        self.head, self.gradient, self.wide, self.kept = head, gradient, wide, kept
        self.tiles, self.parts = Tiles.backward(head), Tiles.forward(head)
        if kernels is None:
            self.parts.fused = _fused_product.columns(head, backend, kind_of(head.hidden))
        self.kernels = kernels or row_kernels(backend, head.softcap)

    def __call__(self, tokens: slice, columns: slice) -> Tensor:
        """That of some tokens and part of the vocabulary, float32 if ``wide``. It may take the place of the logits."""
        kept = self.kept[0][tokens, columns] if self.kept else None
        z = self.tiles.logits_by(self.parts, tokens, columns) if kept is None else kept
        of_rows, inside = self.gradient.rows(tokens), self.head.ids[tokens] - columns.start
        dz = self.tiles.for_gradient(z, self.wide)
        self.kernels.logits_gradient(z, inside, None, of_rows, self.head.temperature, dz, partial=True)
        return dz


def head_gradients(
    head: LinearHead,
    gradient: RowGradient,
    wanted: Sequence[bool],
    backend: str,
    kept: Kept = (),
    kernels: GradientKernel | None = None,
    of_tile: _fused_product.OfProbabilities | None = None,
) -> HeadGradients:
    """Gradients of hidden, weight and bias where ``wanted``. Ids may lie outside the head.

    ``kept`` is what :func:`head_log_probs` returned, which may be overwritten, ``kernels`` as in :class:`OfLogits`,
    which ``of_tile`` stands for where gradients are made of probabilities.
    """
    if kernels is None and backend in HEAD_KERNELS:
        return _backends.head(backend).gradients(head, gradient, wanted, kept[0] if kept else None)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    tiles = Tiles.backward(head)
    if of_tile is None:
        tile_gradient: Callable[[slice, slice], Tensor] = OfLogits(
            head, gradient, backend, grad_bias is not None, kept, kernels
        )
    else:
        tile_gradient, tiles.columns = of_tile, up_to(tiles.columns, of_tile.columns)
    one_column_span, one_token_span = tiles.columns >= len(weight), tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=one_column_span) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    for columns in tiles.column_spans():
        part = None if grad_weight is None else Sum(grad_weight[columns], once=one_token_span, into=True)
        bias_part: Tensor | None = None
        for tokens in tiles.token_spans():
            dz = tile_gradient(tokens, columns)
            if grad_bias is not None:
                of_tokens = dz.sum(0, dtype=torch.float32)
                bias_part = of_tokens if bias_part is None else bias_part + of_tokens
            dz = dz.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden.add(dz, weight[columns], tokens)
            if part is not None:
                part.add(dz.T, hidden[tokens])
            del dz  # before the next product
        if grad_weight is not None and part is not None and not part.once:
            grad_weight[columns] = part.total
        part = None  # before the next one is made
        if grad_bias is not None and bias_part is not None:
            grad_bias[columns] = bias_part.to(grad_bias.dtype)
    of_hidden = None if grad_hidden is None else grad_hidden.total.to(hidden.dtype)
    return HeadGradients(of_hidden, grad_weight, grad_bias)


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
    size = _fused_tiles.fitting(fused_bytes(kind_of(hidden)), all_bytes, hidden.device, FUSED_BYTES)
    tiles = Tiles.of_whole_rows(head, size // itemsize)
    columns = slice(0, len(weight))
    one = tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=True) if wanted[0] else None
    grad_weight = Sum(weight, once=one) if wanted[1] else None
    grad_bias = (
        torch.zeros(len(weight), dtype=torch.float32, device=hidden.device) if bias is not None and wanted[2] else None
    )
    parts, fused = [], _fused_product.columns(head, backend, kind_of(head.hidden))
    for tokens in tiles.token_spans():
        ids = head.ids[tokens]
        if fused is None:
            z = tiles.logits(tokens, columns)
            logp, lse, _ = kernels.token_log_probs([z], ids, None, [head.temperature], False).only_model()
        else:
            z = tiles.empty(len(ids), len(weight))
            logp, lse, _ = _fused_product.log_probs(head._replace(hidden=hidden[tokens], ids=ids), False, fused, z)
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
