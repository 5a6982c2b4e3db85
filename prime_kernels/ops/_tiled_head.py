"""An output layer in tiles: a library product into a buffer, then the row kernels on it while it is in the cache.

A tile holds the logits of some tokens and part of the vocabulary. Forward merges the softmax of a token's tiles;
backward recomputes a tile and overwrites it with its gradient. Scratch memory is one tile for any number of tokens and
any vocabulary. If all logits are few enough, they are kept instead, which saves one of four products.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prime_kernels._backends import GradientKernel, RowGradient, RowResults
from prime_kernels.ops._softcap import row_kernels

# Tokens per tile, by device: enough for a product at full speed.
TOKENS = {"cpu": 1024, "cuda": 8192}
# Logits in memory at once, by device. Forward needs them in the cache; backward gains from larger tiles, with fewer
# roundings of 16-bit partial sums and larger products.
FORWARD_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
BACKWARD_ELEMENTS = {"cpu": 2**24, "cuda": 2**28}
# Logits kept from forward to backward, at most, in bytes, by device.
KEPT_BYTES = {"cpu": 2**27, "cuda": 2**29}
# Rows of logits start at multiples of 16 bytes: vector loads are possible for any vocabulary, and a tile gives the same
# bits at any position.
ALIGNED_COLUMNS = 8
# Size of tiles over the whole vocabulary. The gradient of the head is summed over them: the fewer the better.
FUSED_BYTES = 2**27
# Rows of a 16-bit product that is added to a float32 sum, by device: enough for full speed, small next to the sum.
ADDED_ROWS = {"cpu": 2**12, "cuda": 2**14}


class HeadGradients(NamedTuple):
    """Gradients of hidden states and an output layer, None where not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


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


class Tiles:
    """Products of tokens [N, D] with parts of a head [V, D], all in one buffer of bounded size."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, elements: int, *, whole_rows: bool = False
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        if whole_rows:
            self.tokens, self.columns = max(1, min(len(hidden), elements // len(weight))), len(weight)
        else:
            self.tokens, self.columns = tile_shape(elements, len(hidden), len(weight), TOKENS[_kind(hidden)])
        self.buffer: Tensor | None = None

    def token_spans(self) -> Iterator[slice]:
        return spans(len(self.hidden), self.tokens)

    def column_spans(self) -> Iterator[slice]:
        return spans(len(self.weight), self.columns)

    def logits(self, tokens: slice, columns: slice, out: Tensor | None = None) -> Tensor:
        """The tile [tokens, columns] in the dtype of the inputs, as in the model's own forward pass."""
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
    """An uninitialised buffer for all logits [N, V] of tokens [N, D] and a head [V, D]."""
    return hidden.new_empty(len(hidden), _aligned(len(weight)))[:, : len(weight)]


def can_keep(hidden: Tensor, weight: Tensor, backend: str, softcap: float | None = None) -> bool:
    """Whether forward computes all logits of tokens [N, D] and a head [V, D] and they are few enough to keep.

    Capped logits are not kept: the cap works on a float32 tile at a time.
    """
    few = softcap is None and len(hidden) * len(weight) * hidden.element_size() <= KEPT_BYTES[_kind(hidden)]
    return few and _fused_kernel(hidden, weight, backend) is None


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
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    with_entropy: bool,
    backend: str,
    kept: Tensor | None = None,
    softcap: float | None = None,
) -> RowResults:
    """Results [N] of hidden states [N, D]. For ids outside the head logp is meaningless.

    ``kept`` [N, V] receives the logits if it is given; the results are bitwise the same with and without it.
    """
    if softcap is None and (fused_kernel := _fused_kernel(hidden, weight, backend)) is not None:
        return fused_kernel(hidden, weight, bias, ids.clamp(0, len(weight) - 1), temperature, with_entropy)
    kernels = row_kernels(backend, softcap)
    tiles = Tiles(hidden, weight, bias, FORWARD_ELEMENTS[_kind(hidden)])
    blocks = []
    for tokens in tiles.token_spans():
        parts = []
        for columns in tiles.column_spans():
            z = tiles.logits(tokens, columns, None if kept is None else kept[tokens, columns])
            inside = (ids[tokens] - columns.start).clamp(0, z.shape[1] - 1)
            parts.append(kernels.token_log_probs([z], inside, None, [temperature], with_entropy).only_model())
        last = -(-len(weight) // tiles.columns) - 1
        blocks.append(join(parts, (ids[tokens] // tiles.columns).clamp(0, last)))
    return RowResults.cat(blocks, 0)


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
    softcap: float | None = None,
    kernels: GradientKernel | None = None,
) -> HeadGradients:
    """Gradients of hidden, weight and bias where ``wanted``. Ids may lie outside the head.

    ``kept`` holds the logits that :func:`head_log_probs` stored there; they are overwritten. ``kernels`` stands for
    those of the backend where a token has several ids.
    """
    kernels = kernels or row_kernels(backend, softcap)
    elements = BACKWARD_ELEMENTS[_kind(hidden)]
    if can_keep(hidden, weight, backend, softcap):
        elements = len(hidden) * len(weight)
        if kept is None:
            kept = _recompute(hidden, weight, bias)
    tiles = Tiles(hidden, weight, bias, elements)
    one_column_span, one_token_span = tiles.columns >= len(weight), tiles.tokens >= len(hidden)
    hidden_sum = Sum(hidden, once=one_column_span) if wanted[0] else None
    grad_weight = torch.empty_like(weight) if wanted[1] else None
    grad_bias = torch.empty_like(bias) if bias is not None and wanted[2] else None
    for columns in tiles.column_spans():
        part = None if grad_weight is None else Sum(grad_weight[columns], once=one_token_span, into=True)
        bias_part: Tensor | None = None
        for tokens in tiles.token_spans():
            z = tiles.logits(tokens, columns) if kept is None else kept
            of_rows = gradient.rows(tokens)
            inside = ids[tokens] - columns.start
            kernels.logits_gradient(z, inside, None, of_rows, temperature, z, partial=True)
            if hidden_sum is not None:
                hidden_sum.add(z, weight[columns], tokens)
            if part is not None:
                part.add(z.T, hidden[tokens])
            if grad_bias is not None:
                of_tokens = z.sum(0, dtype=torch.float32)
                bias_part = of_tokens if bias_part is None else bias_part + of_tokens
        if grad_weight is not None and part is not None and not part.once:
            grad_weight[columns] = part.total
        part = None  # before the next one is made
        if grad_bias is not None and bias_part is not None:
            grad_bias[columns] = bias_part.to(grad_bias.dtype)
    grad_hidden = None if hidden_sum is None else hidden_sum.total.to(hidden.dtype)
    return HeadGradients(grad_hidden, grad_weight, grad_bias)


def _recompute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits that head_log_probs would have kept, by the same tiles: equal bits, hence equal gradients."""
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
    softcap: float | None = None,
) -> tuple[Tensor, HeadGradients]:
    """logp and the gradients from one product, for losses of which a token's gradient follows from its logp.

    ``grad_of(logp, tokens)`` is d loss / d logp of a span of tokens.
    """
    kernels = row_kernels(backend, softcap)
    tiles = Tiles(hidden, weight, bias, FUSED_BYTES // hidden.element_size(), whole_rows=True)
    columns = slice(0, len(weight))
    one = tiles.tokens >= len(hidden)
    hidden_sum = Sum(hidden, once=True) if wanted[0] else None
    weight_sum = Sum(weight, once=one) if wanted[1] else None
    grad_bias = (
        torch.zeros(len(weight), dtype=torch.float32, device=hidden.device) if bias is not None and wanted[2] else None
    )
    parts = []
    for tokens in tiles.token_spans():
        z = tiles.logits(tokens, columns)
        logp, lse, _ = kernels.token_log_probs([z], ids[tokens], None, [temperature], False).only_model()
        parts.append(logp)
        if not any(wanted):
            continue
        gradient = RowGradient(lse, None, grad_of(logp, tokens), None)
        kernels.logits_gradient(z, ids[tokens], None, gradient, temperature, z)
        if hidden_sum is not None:
            hidden_sum.add(z, weight, tokens)
        if weight_sum is not None:
            weight_sum.add(z.T, hidden[tokens])
        if grad_bias is not None:
            grad_bias += z.sum(0, dtype=torch.float32)
    del tiles, z  # frees their memory before the sums are rounded
    grad_hidden, grad_weight = (
        None if sums is None else sums.total.to(hidden.dtype) for sums in (hidden_sum, weight_sum)
    )
    return torch.cat(parts), HeadGradients(
        grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(hidden.dtype)
    )


def _fused_kernel(hidden: Tensor, weight: Tensor, backend: str) -> Callable[..., RowResults] | None:
    """The Triton kernel without tiles, if it is enabled and supports these tensors."""
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
        else:
            for block in spans(len(a), ADDED_ROWS[_kind(a)]):
                at[block].add_(a[block] @ b)
