"""Log-probs of an output layer without all of its logits at once, and their gradients.

On CPUs by kernels of their own (_native/head.py). Elsewhere by tiles, some tokens by some of the vocabulary: a library
product into a buffer, then the row kernels on it while it is in cache. Forward joins the softmax of a token's tiles;
backward computes a tile again and turns it into its own gradient in place. Scratch memory is one tile, whatever the
tokens and the vocabulary; logits that are few enough in all are kept instead, which saves one of four products.

Logits are float32, from a product of 16-bit operands too, unless the head wants them rounded as its own layer does.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prime_kernels import _backends
from prime_kernels._backends import HeadGradients, LinearHead, RowGradient, RowKernels, RowResults
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops._softcap import cap, slope, through_cap

# Backends with kernels for a whole head, unless it caps its logits. They make float32 logits in cache, whatever the
# sizes below.
HEAD_KERNELS = frozenset({"cpu"})
# Tokens of a tile, by device: enough for a product at full speed.
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits alive at once, by device. Forward wants them in cache; in backward fewer, larger tiles mean fewer roundings of
# 16-bit partial sums and longer products.
FORWARD_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
BACKWARD_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# The logits of a call that are kept from forward to backward, in bytes, by device.
KEPT_BYTES = {"cpu": 2**28, "cuda": 2**29}
# Rows of logits start at multiples of 16 bytes: loads are wide for any vocabulary, and a tile gives the same bits
# wherever it lies.
ALIGNED_COLUMNS = 8
# Tiles of all the vocabulary, whose gradient of the head is summed over tiles: the fewer the better.
FUSED_BYTES = 2**27
# Rows of a 16-bit product that is added to a float32 sum, by device: enough for full speed, few beside the sum.
ADDED_ROWS = {"cpu": 2**12, "cuda": 2**14}


def spans(total: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``total``."""
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


class Tiles:
    """Products of tokens [N, D] with parts of a head [V, D], all in one buffer of bounded size."""

    def __init__(self, head: LinearHead, elements: int, *, whole_rows: bool = False) -> None:
        self.head, self.dtype = head, logits_dtype(head)
        n_tokens, vocabulary = len(head.hidden), len(head.weight)
        self.tokens = max(1, min(n_tokens, TOKENS[_kind(head.hidden)]))
        self.columns = vocabulary if whole_rows else max(1, min(vocabulary, elements // self.tokens))
        if ALIGNED_COLUMNS < self.columns < vocabulary:
            self.columns -= self.columns % ALIGNED_COLUMNS
        if self.columns == vocabulary:
            self.tokens = max(1, min(n_tokens, elements // self.columns))
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


def logits_dtype(head: LinearHead) -> torch.dtype:
    return head.hidden.dtype if head.rounded else torch.float32


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` to ``out``, of their dtype or float32. On GPUs the accumulators of a 16-bit product are not rounded."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def _has_kernels(head: LinearHead, backend: str) -> bool:
    return backend in HEAD_KERNELS and head.softcap is None


def kept_logits(head: LinearHead, backend: str) -> Tensor | None:
    """Room for all logits from forward to backward, or None where they are too many or no kernel can use them.

    Capped logits are not kept: the cap works on a float32 tile at a time.
    """
    if head.softcap is not None:
        return None
    if len(head.hidden) * len(head.weight) * _itemsize(head, backend) > KEPT_BYTES[_kind(head.hidden)]:
        return None
    if _has_kernels(head, backend):
        return _backends.head(backend).kept_logits(head)
    return None if _fused_kernel(head, backend) else _all_logits(head)


def _itemsize(head: LinearHead, backend: str) -> int:
    """Bytes of a logit that is kept."""
    return 4 if _has_kernels(head, backend) else logits_dtype(head).itemsize


def _all_logits(head: LinearHead) -> Tensor:
    """Room for all logits [N, V]."""
    n_tokens, vocabulary = len(head.hidden), len(head.weight)
    return head.hidden.new_empty(n_tokens, _aligned(vocabulary), dtype=logits_dtype(head))[:, :vocabulary]


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


def head_log_probs(head: LinearHead, with_entropy: bool, backend: str, kept: Tensor | None = None) -> RowResults:
    """Results [N]. For ids outside the head logp is meaningless.

    ``kept``, of :func:`kept_logits`, receives the logits if it is given; the results are bitwise the same with and
    without it.
    """
    if _has_kernels(head, backend):
        return _backends.head(backend).token_log_probs(head, with_entropy, kept)
    if (fused_kernel := _fused_kernel(head, backend)) is not None:
        ids = head.ids.clamp(0, len(head.weight) - 1)
        return fused_kernel(head.hidden, head.weight, head.bias, ids, head.temperature, with_entropy)
    kernels = _backends.rows(backend)
    tiles = Tiles(head, FORWARD_ELEMENTS[_kind(head.hidden)])
    blocks = []
    for tokens in tiles.token_spans():
        parts = []
        for columns in tiles.column_spans():
            z = tiles.logits(tokens, columns, None if kept is None else kept[tokens, columns])
            z = z if head.softcap is None else cap(z.to(result_dtype(z)), head.softcap)
            inside = (head.ids[tokens] - columns.start).clamp(0, z.shape[1] - 1)
            found = kernels.token_log_probs([z], inside, None, [head.temperature], with_entropy)
            parts.append(found.only_model())
        last = -(-len(head.weight) // tiles.columns) - 1
        blocks.append(join(parts, (head.ids[tokens] // tiles.columns).clamp(0, last)))
    return RowResults.cat(blocks, 0)


def head_gradients(
    head: LinearHead, gradient: RowGradient, wanted: Sequence[bool], backend: str, kept: Tensor | None = None
) -> HeadGradients:
    """Gradients of hidden, weight and bias where ``wanted``. Ids may lie outside the head.

    ``kept`` holds the logits that :func:`head_log_probs` stored there; they may be overwritten.
    """
    if _has_kernels(head, backend):
        return _backends.head(backend).gradients(head, gradient, wanted, kept)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    kernels = _backends.rows(backend)
    elements = BACKWARD_ELEMENTS[_kind(hidden)] * hidden.element_size() // logits_dtype(head).itemsize
    if kept is None and (kept := kept_logits(head, backend)) is not None:
        _make_again(head, kept)
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
            _to_gradient(kernels, head, z, inside, of_rows, partial=True)
            if grad_bias is not None:
                of_tokens = z.sum(0, dtype=torch.float32)
                bias_part = of_tokens if bias_part is None else bias_part + of_tokens
            z = z.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden.add(z, weight[columns], tokens)
            if part is not None:
                part.add(z.T, hidden[tokens])
            del z  # the rounded one, before the next product
        if grad_weight is not None and part is not None and not part.once:
            grad_weight[columns] = part.total
        part = None  # before the next one is made
        if grad_bias is not None and bias_part is not None:
            grad_bias[columns] = bias_part.to(grad_bias.dtype)
    of_hidden = None if grad_hidden is None else grad_hidden.total.to(hidden.dtype)
    return HeadGradients(of_hidden, grad_weight, grad_bias)


def _make_again(head: LinearHead, logits: Tensor) -> None:
    """The logits that head_log_probs could have kept, by its tiles: the same bits, hence the same gradients."""
    tiles = Tiles(head, FORWARD_ELEMENTS[_kind(head.hidden)])
    for tokens in tiles.token_spans():
        for columns in tiles.column_spans():
            tiles.logits(tokens, columns, logits[tokens, columns])


def loss_gradients(
    head: LinearHead, grad_of: Callable[[Tensor, slice], Tensor], wanted: Sequence[bool], backend: str
) -> tuple[Tensor, HeadGradients]:
    """(logp, gradients): both from one product, where a token's gradient follows from its logp.

    ``grad_of(logp, tokens)`` is d loss / d logp of a span of tokens. Kernels of a whole head make more logits than they
    can keep twice.
    """
    if _has_kernels(head, backend):
        kept = kept_logits(head, backend) if any(wanted) else None
        logp, lse, _ = head_log_probs(head, False, backend, kept)
        if not any(wanted):
            return logp, HeadGradients(None, None, None)
        gradient = RowGradient(lse, None, grad_of(logp, slice(0, len(logp))), None)
        return logp, head_gradients(head, gradient, wanted, backend, kept)
    hidden, weight, bias = head.hidden, head.weight, head.bias
    kernels = _backends.rows(backend)
    tiles = Tiles(head, FUSED_BYTES // logits_dtype(head).itemsize, whole_rows=True)
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
        seen = z if head.softcap is None else cap(z.to(result_dtype(z), copy=True), head.softcap)
        found = kernels.token_log_probs([seen], head.ids[tokens], None, [head.temperature], False)
        logp, lse, _ = found.only_model()
        del seen
        parts.append(logp)
        if not any(wanted):
            continue
        gradient = RowGradient(lse, None, grad_of(logp, tokens), None)
        _to_gradient(kernels, head, z, head.ids[tokens], gradient)
        if grad_bias is not None:
            grad_bias += z.sum(0, dtype=torch.float32)
        z = z.to(hidden.dtype)
        if grad_hidden is not None:
            grad_hidden.add(z, weight, tokens)
        if grad_weight is not None:
            grad_weight.add(z.T, hidden[tokens])
        del z  # the rounded one, before the next product
    del tiles  # before the sums are rounded, which takes memory too
    of_hidden, of_weight = (
        None if sums is None else sums.total.to(hidden.dtype) for sums in (grad_hidden, grad_weight)
    )
    of_bias = None if grad_bias is None else grad_bias.to(hidden.dtype)
    return torch.cat(parts), HeadGradients(of_hidden, of_weight, of_bias)


def _to_gradient(
    kernels: RowKernels, head: LinearHead, z: Tensor, ids: Tensor, gradient: RowGradient, partial: bool = False
) -> None:
    """Logits become their own gradient."""
    if head.softcap is None:
        kernels.logits_gradient(z, ids, None, gradient, head.temperature, z, partial=partial)
        return
    values = cap(z.to(result_dtype(z)), head.softcap)
    of_cap = slope(values, head.softcap)
    kernels.logits_gradient(values, ids, None, gradient, head.temperature, values, partial=partial)
    z.copy_(through_cap(values, of_cap))


def _fused_kernel(head: LinearHead, backend: str) -> Callable[..., RowResults] | None:
    """The Triton kernel that makes no tile at all, where it is the faster way and takes these tensors.

    Its logits are never rounded or capped.
    """
    rounds = head.rounded and head.hidden.dtype != torch.float32
    if backend != "triton" or rounds or head.softcap is not None:
        return None
    from prime_kernels._triton import _launch_config

    if not _launch_config.FUSED_LINEAR:
        return None
    from prime_kernels._triton import linear_log_probs

    return linear_log_probs.linear_token_log_probs if linear_log_probs.supported(head.hidden, head.weight) else None


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNED_COLUMNS) * ALIGNED_COLUMNS


def _kind(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


class Sum:
    """A sum of products: written once where there is one term, else float32, as a 16-bit sum would stop counting.

    What is written once goes to a tensor like ``like``, or to that itself with ``into``.
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
        else:
            for block in spans(len(a), ADDED_ROWS[_kind(a)]):
                at[block].add_(a[block] @ b)
