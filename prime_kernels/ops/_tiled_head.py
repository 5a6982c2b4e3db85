"""Logits that exist one tile at a time: a library product into a buffer, the row kernels on it while it is in cache.

A tile is some tokens by some of the vocabulary. Forward joins the softmax of a token's tiles; backward computes a tile
again and turns it into its own gradient in place. Scratch memory is one tile, whatever the tokens and the vocabulary;
logits that are few enough in all are kept instead, which saves one of four products.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prime_kernels import _backends
from prime_kernels._backends import RowGradient, RowResults

# Tokens of a tile, by device: enough for a product at full speed.
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits alive at once, by device. Forward wants them in cache; in backward fewer, larger tiles mean fewer roundings of
# 16-bit partial sums and longer products.
FORWARD_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
BACKWARD_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# The logits of a call that are kept from forward to backward, in bytes, by device.
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**29}
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

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, elements: int, *, whole_rows: bool = False
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.tokens = max(1, min(len(hidden), TOKENS[_kind(hidden)]))
        self.columns = len(weight) if whole_rows else max(1, min(len(weight), elements // self.tokens))
        if ALIGNED_COLUMNS < self.columns < len(weight):
            self.columns -= self.columns % ALIGNED_COLUMNS
        if self.columns == len(weight):
            self.tokens = max(1, min(len(hidden), elements // self.columns))
        self.buffer: Tensor | None = None

    def token_spans(self) -> Iterator[slice]:
        return spans(len(self.hidden), self.tokens)

    def column_spans(self) -> Iterator[slice]:
        return spans(len(self.weight), self.columns)

    def logits(self, tokens: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """The tile [tokens, columns], in the dtype of the inputs, as the model's own forward pass has it."""
        hidden, weight = self.hidden[tokens], self.weight[columns]
        if out is None:
            if self.buffer is None:
                self.buffer = hidden.new_empty(self.tokens * _aligned(self.columns))
            width = _aligned(len(weight))
            out = self.buffer[: len(hidden) * width].view(len(hidden), width)[:, : len(weight)]
        if self.bias is None:
            return torch.mm(hidden, weight.T, out=out)
        return torch.addmm(self.bias[columns], hidden, weight.T, out=out)


def all_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Room for all logits [N, V] of tokens [N, D] and a head [V, D]."""
    return hidden.new_empty(len(hidden), _aligned(len(weight)))[:, : len(weight)]


def can_keep(hidden: Tensor, weight: Tensor, backend: str) -> bool:
    """Whether forward makes all logits of tokens [N, D] and a head [V, D], and they are few enough to stay alive."""
    few = len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES[_kind(hidden)]
    return few and _fused_kernel(hidden, weight, backend) is None


def first_model(results: RowResults) -> RowResults:
    """Results [N] of the only model, from [1, N]."""
    return RowResults(*(None if column is None else column[0] for column in results))


def join(parts: Sequence[RowResults], owner: Tensor) -> RowResults:
    """Results of whole rows from those of parts of their vocabulary; ``owner`` [N] is the part with the target."""
    if len(parts) == 1:
        return parts[0]
    logp, lse = (torch.stack([part[k] for part in parts]).double() for k in range(2))
    every = lse.logsumexp(0)
    own_logp, own_lse = (column.gather(0, owner.unsqueeze(0)).squeeze(0) for column in (logp, lse))
    others = lse.scatter(0, owner.unsqueeze(0), -torch.inf).logsumexp(0)
    # Relative to the target's own part, so that a log-probability near 0 keeps its digits. A part of nothing but -inf
    # has no distribution of its own, and its tokens probability 0.
    joined = own_logp - torch.nn.functional.softplus(others - own_lse)
    impossible = (own_lse == -torch.inf) & (every > -torch.inf)
    joined = joined.masked_fill(impossible, -torch.inf)
    entropy = None
    if parts[0].entropy is not None:
        log_share = lse - every
        share = log_share.exp()
        terms = share * (torch.stack([part.entropy for part in parts]).double() - log_share)
        # Where every is NaN or infinite there is no distribution, and 0 * every says so.
        entropy = (terms.where(share > 0, 0.0).sum(0) + 0.0 * every).float()
    return RowResults(joined.float(), every.float(), entropy)


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    with_entropy: bool,
    backend: str,
    kept: Tensor | None = None,
) -> RowResults:
    """Results [N] of hidden states [N, D]. For ids outside the head logp is meaningless.

    ``kept`` [N, V] receives the logits if it is given; the results are bitwise the same with and without it.
    """
    if (fused_kernel := _fused_kernel(hidden, weight, backend)) is not None:
        return fused_kernel(hidden, weight, bias, ids.clamp(0, len(weight) - 1), temperature, with_entropy)
    kernels = _backends.rows(backend)
    tiles = Tiles(hidden, weight, bias, FORWARD_ELEMENTS[_kind(hidden)])
    blocks = []
    for tokens in tiles.token_spans():
        parts = []
        for columns in tiles.column_spans():
            z = tiles.logits(tokens, columns, None if kept is None else kept[tokens, columns])
            inside = (ids[tokens] - columns.start).clamp(0, z.shape[1] - 1)
            parts.append(first_model(kernels.token_log_probs([z], inside, None, [temperature], with_entropy)))
        last = -(-len(weight) // tiles.columns) - 1
        blocks.append(join(parts, (ids[tokens] // tiles.columns).clamp(0, last)))
    return RowResults(*(None if column[0] is None else torch.cat(column) for column in zip(*blocks, strict=True)))


def head_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    gradient: RowGradient,
    wanted: Sequence[bool],
    backend: str,
    kept: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias) where ``wanted``. Ids may lie outside the head.

    ``kept`` holds the logits that :func:`head_log_probs` stored there; they are overwritten.
    """
    kernels = _backends.rows(backend)
    elements = BACKWARD_ELEMENTS[_kind(hidden)]
    if can_keep(hidden, weight, backend):
        elements = len(hidden) * len(weight)
        if kept is None:
            kept = _again(hidden, weight, bias)
    tiles = Tiles(hidden, weight, bias, elements)
    one_column_span, one_token_span = tiles.columns >= len(weight), tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=one_column_span) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    for columns in tiles.column_spans():
        part = None if grad_weight is None else Sum(grad_weight[columns], once=one_token_span, into=True)
        bias_part = 0.0
        for tokens in tiles.token_spans():
            z = tiles.logits(tokens, columns) if kept is None else kept
            of_tokens = RowGradient(*(None if c is None else c[tokens] for c in gradient))
            kernels.logits_gradient(z, ids[tokens] - columns.start, None, of_tokens, temperature, z, partial=True)
            if grad_hidden is not None:
                grad_hidden.add(z, weight[columns], tokens)
            if part is not None:
                part.add(z.T, hidden[tokens])
            if grad_bias is not None:
                bias_part = bias_part + z.sum(0, dtype=torch.float32)
        if part is not None and not part.once:
            grad_weight[columns] = part.total
        part = None  # before the next one is made
        if grad_bias is not None:
            grad_bias[columns] = bias_part.to(bias.dtype)
    return None if grad_hidden is None else grad_hidden.total.to(hidden.dtype), grad_weight, grad_bias


def _again(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits that head_log_probs could have kept, by its tiles: the same bits, hence the same gradients."""
    tiles = Tiles(hidden, weight, bias, FORWARD_ELEMENTS[_kind(hidden)])
    logits = all_logits(hidden, weight)
    for tokens in tiles.token_spans():
        for columns in tiles.column_spans():
            tiles.logits(tokens, columns, logits[tokens, columns])
    return logits


def loss_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    grad_of: Callable[[Tensor, slice], Tensor],
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logp, gradients of hidden, weight, bias): both from one product, where a token's gradient follows from its logp.

    ``grad_of(logp, tokens)`` is d loss / d logp of a span of tokens.
    """
    kernels = _backends.rows(backend)
    tiles = Tiles(hidden, weight, bias, FUSED_BYTES // hidden.element_size(), whole_rows=True)
    columns = slice(0, len(weight))
    one = tiles.tokens >= len(hidden)
    grad_hidden = Sum(hidden, once=True) if wanted[0] else None
    grad_weight = Sum(weight, once=one) if wanted[1] else None
    grad_bias = torch.zeros(len(weight), device=hidden.device) if bias is not None and wanted[2] else None
    parts = []
    for tokens in tiles.token_spans():
        z = tiles.logits(tokens, columns)
        logp, lse, _ = first_model(kernels.token_log_probs([z], ids[tokens], None, [temperature], False))
        parts.append(logp)
        if not any(wanted):
            continue
        gradient = RowGradient(lse, None, grad_of(logp, tokens), None)
        kernels.logits_gradient(z, ids[tokens], None, gradient, temperature, z)
        if grad_hidden is not None:
            grad_hidden.add(z, weight, tokens)
        if grad_weight is not None:
            grad_weight.add(z.T, hidden[tokens])
        if grad_bias is not None:
            grad_bias += z.sum(0, dtype=torch.float32)
    del tiles, z  # before the sums are rounded, which takes memory too
    totals = [None if each is None else each.total.to(hidden.dtype) for each in (grad_hidden, grad_weight)]
    return torch.cat(parts), *totals, None if grad_bias is None else grad_bias.to(bias.dtype)


def _fused_kernel(hidden: Tensor, weight: Tensor, backend: str) -> Callable | None:
    """The Triton kernel that makes no tile at all, where it is the faster way and takes these tensors."""
    if backend != "triton":
        return None
    from prime_kernels._triton import _launch_config

    if not _launch_config.FUSED_LINEAR:
        return None
    from prime_kernels._triton import linear_log_probs

    return linear_log_probs.linear_token_log_probs if linear_log_probs.supported(hidden, weight) else None


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
