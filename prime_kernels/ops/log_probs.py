"""Log-probability of given tokens under a softmax over logits, and its entropy.

With z = cap(logits) / temperature, where cap(x) = softcap * tanh(x / softcap), or x without one, and
log p = z - logsumexp(z), per row:
    logp = log p[id],    entropy = -sum_v p_v log p_v    (terms with p_v = 0 are 0)
    d logp / d z_v    = 1[v = id] - p_v
    d entropy / d z_v = -p_v (log p_v + entropy)
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import RowGradient, RowResults
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _softcap
from prime_kernels.ops._several_ids import LogitsLogProbs


def reference(logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of each row and of ids [...] or [..., K], in float32 or float64. Masked rows pass no gradient."""
    scaled = logits.to(result_dtype(logits)) / temperature
    if mask is not None:
        scaled = scaled.masked_fill(~mask.unsqueeze(-1), 0.0)
    # Not log_softmax, whose sum over a large vocabulary drifts; logsumexp sums pairwise and its backward is faster.
    lse = scaled.logsumexp(-1, keepdim=True)
    # A row with a logit of +inf has no distribution: NaN everywhere, as the kernels have it.
    log_p = scaled - lse.masked_fill(lse == torch.inf, torch.nan)
    # sum(-1) of one term rather than squeeze: a view made under no_grad could not be changed in place later.
    several = ids.ndim == logits.ndim
    logp = log_p.gather(-1, ids) if several else log_p.gather(-1, ids.unsqueeze(-1)).sum(-1)
    # An impossible token has p = 0 and log p = -inf; filling before the product keeps 0 * -inf out of the gradient too.
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if mask is not None:
        logp = logp.masked_fill(~mask.unsqueeze(-1) if several else ~mask, 0.0)
        entropy = entropy.masked_fill(~mask, 0.0)
    return logp, entropy


def row_views(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """2-D views that together cover the rows of the tensors, which have one shape, in order and without a copy."""
    try:
        views = tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)
    except RuntimeError:
        for parts in zip(*(tensor.unbind(0) for tensor in tensors), strict=True):
            yield from row_views(*parts)
    else:
        yield views


class LogProbs(torch.autograd.Function):
    """Row kernels on views [N, V] of the logits. "eager" comes here only for ``inplace_backward``."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        temperature: float,
        with_entropy: bool,
        inplace: bool,
        backend: str,
        softcap: float | None,
    ) -> tuple[Tensor, Tensor | None]:
        results = log_probs_of_views([logits], ids, mask, [temperature], with_entropy, backend, softcap)
        logp, lse, entropy = as_one(results, ids.shape)
        ctx.save_for_backward(logits, ids, mask, lse, entropy)
        ctx.temperature, ctx.inplace, ctx.backend, ctx.overwritten = temperature, inplace, backend, False
        ctx.softcap = softcap
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @first_derivative_only("log_probs")
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
        if ctx.overwritten:
            raise RuntimeError(
                "inplace_backward: the first backward wrote the gradient over the logits, so there can be no second; "
                "expected inplace_backward=False for a graph that is kept with retain_graph=True"
            )
        logits, ids, mask, lse, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 8
        out = logits.detach() if ctx.inplace else _backends.empty_like(logits, ctx.backend)
        gradient = RowGradient(lse, entropy, grad_logp, grad_entropy)
        gradient_of_views(logits, ids, mask, gradient, ctx.temperature, out, ctx.backend, ctx.softcap)
        if ctx.inplace:
            ctx.overwritten = True
            # Others that saved these logits for backward now get an error from autograd, not a wrong gradient.
            torch.autograd.graph.increment_version(logits)
        return out, None, None, None, None, None, None, None


def log_probs_of_views(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
    backend: str,
    softcap: float | None = None,
) -> RowResults:
    """Results [models, N] of the N rows of the models' logits [..., V], of any leading strides, in one pass."""
    kernels = _softcap.row_kernels(backend, softcap)
    flat_ids, flat_mask = ids.reshape(-1), None if mask is None else mask.reshape(-1)
    parts: list[RowResults] = []
    start = 0
    for views in row_views(*models):
        piece = slice(start, start + views[0].shape[0])
        row_ids, row_mask = flat_ids[piece], None if flat_mask is None else flat_mask[piece]
        parts.append(kernels.token_log_probs(views, row_ids, row_mask, temperatures, with_entropy))
        start = piece.stop
    return parts[0] if len(parts) == 1 else RowResults.cat(parts, 1)


def as_one(results: RowResults, shape: torch.Size) -> RowResults:
    """Results [1, N] of one model in another shape, in place: a view could not be changed in place by the caller."""
    return RowResults(
        results.logp.resize_(shape),
        results.lse.resize_(shape),
        None if results.entropy is None else results.entropy.resize_(shape),
    )


def of_model(column: Tensor, place: int, shape: torch.Size) -> Tensor:
    """A copy of one model's part of a column [models, N]: a view could not be changed in place by the caller."""
    return column[place].view(shape).clone()


def gradient_of_views(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    gradient: RowGradient,
    temperature: float,
    out: Tensor,
    backend: str,
    softcap: float | None = None,
) -> None:
    """Write the gradient of the logits [..., V] to ``out``: dense, or the logits themselves."""
    kernels = _softcap.row_kernels(backend, softcap)
    flat_ids, flat_mask, flat = ids.reshape(-1), None if mask is None else mask.reshape(-1), gradient.flat()
    start = 0
    # In place, the logits and the gradient are walked by the same views; otherwise both in row order.
    out_rows = None if out.data_ptr() == logits.data_ptr() else out.view(-1, out.shape[-1])
    for (rows,) in row_views(logits.detach()):
        piece = slice(start, start + rows.shape[0])
        target = rows if out_rows is None else out_rows[piece]
        row_mask = None if flat_mask is None else flat_mask[piece]
        kernels.logits_gradient(rows, flat_ids[piece], row_mask, flat.rows(piece), temperature, target)
        start = piece.stop


def check_arguments(
    logits: Tensor, ids: Tensor, mask: Tensor | None, *, name: str, vocabulary: int, several: bool = False
) -> Tensor:
    """Check labels and mask against rows of ``name``; the labels as int64, masked ones replaced by 0.

    With ``several`` labels may also be [..., K], and the mask is [...].
    """
    _checks.tensor("ids", ids, _checks.INTEGERS)
    if not several or ids.ndim != logits.ndim:
        _checks.shape("ids", ids, logits.shape[:-1], f"the leading dimensions of {name}")
        _checks.device("ids", ids, logits, name)
        _checks.mask(mask, ids, "ids")
        return _checks.labels("ids", ids, mask, vocabulary)
    if ids.shape[-1] == 0:
        raise ValueError(f"ids: expected shape [..., K] with K of at least 1, got {list(ids.shape)}")
    _checks.shape("ids", ids, (*logits.shape[:-1], ids.shape[-1]), f"the leading dimensions of {name}, and K")
    _checks.device("ids", ids, logits, name)
    _checks.mask(mask, ids[..., 0], "the leading dimensions of ids")
    return _checks.labels("ids", ids, None if mask is None else mask.unsqueeze(-1).expand_as(ids), vocabulary)


def check_logits(name: str, logits: Tensor) -> None:
    """A floating tensor [..., V] with V of at least 1."""
    _checks.floating(name, logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name}: expected shape [..., V] with V of at least 1, got {list(logits.shape)}")


def check_temperature(name: str, temperature: float) -> float:
    """A finite number above 0."""
    return _checks.number(name, temperature, 0.0, math.inf, above_low=True)


def check(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    with_entropy: bool,
    backend: str | None,
    several: bool = False,
) -> tuple[Tensor, float, str]:
    """(ids, temperature, backend) of arguments that have passed every check."""
    check_logits("logits", logits)
    ids = check_arguments(logits, ids, mask, name="logits", vocabulary=logits.shape[-1], several=several)
    temperature = check_temperature("temperature", temperature)
    _checks.flag("with_entropy", with_entropy)
    return ids, temperature, _dispatch.resolve("log_probs", logits, backend)


@overload
def log_probs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: Literal[False] = ...,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def log_probs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: Literal[True],
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def log_probs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: bool,
    inplace_backward: bool = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def log_probs(
    logits: Tensor,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token, and optionally the entropy of its distribution, in nats.

    logp = z[id] - logsumexp(z) and entropy = -sum p log p, with z = logits / temperature, or
    z = softcap * tanh(logits / softcap) / temperature. Differentiable in ``logits``, which are not changed. A logit of
    -inf is a token of probability 0, also in the gradient. A row with a NaN or a logit of +inf, the target's included,
    or with nothing but -inf has no distribution: its results are NaN.

    Args:
        logits: [..., V], any strides; float32, bfloat16 or float16 (float64 on "eager"). Computed in float32.
            Logits whose last stride is not 1 are copied, others are not.
        ids: [...], int32 or int64, in [0, V); or [..., K], K tokens of each row in the same pass (any of them may come
            several times). The first one's log-prob has the same bits as with it alone.
        mask: [...], bool, or None for all. Where False, the results are exactly 0 and the gradient is 0; logits
            and label are not read.
        temperature: above 0.
        softcap: above 0, caps the logits before the temperature; None for no cap. An infinite logit is one of
            -softcap or softcap. Capped logits exist for a block of rows at a time, in float32.
        with_entropy: also return the entropy.
        inplace_backward: let backward write the gradient over the storage of ``logits``, which saves their size in
            memory. The logits are lost: a second backward (retain_graph) raises RuntimeError. No effect inside
            torch.compile; not with ids [..., K].
        backend: see :mod:`prime_kernels`.

    Returns:
        logp in the shape of ids, or (logp, entropy [...]): float32, float64 for float64 logits.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or temperature; inplace_backward with rows that are not dense or overlap, or
            with ids [..., K].
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.
        RuntimeError, in a backward pass: a second derivative through a kernel ("eager" has it).

    Source: the token log-probabilities of arXiv 2502.01456, section 2.
    """
    softcap = _softcap.check_softcap("softcap", softcap)
    # Several ids are plain PyTorch in a graph, as the reference has them.
    if torch.compiler.is_compiling() and ids.ndim != logits.ndim:
        # One node of the graph, which checks its arguments and selects its backend at run time. The compiler plans
        # memory, so the gradient is not written in place.
        arguments = (logits, ids, mask, temperature, softcap, with_entropy, backend)
        logp, _, entropy = torch.ops.prime_kernels.log_probs(*arguments)
        return (logp, entropy) if with_entropy else logp
    ids, temperature, chosen = check(logits, ids, mask, temperature, with_entropy, backend, several=True)
    _checks.flag("inplace_backward", inplace_backward)
    several = ids.ndim == logits.ndim
    if several and inplace_backward:
        raise ValueError(f"inplace_backward: expected False with ids [..., K], got True with ids {list(ids.shape)}")
    if inplace_backward:
        overlaps = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
        if overlaps or (logits.stride(-1) != 1 and logits.shape[-1] > 1):
            raise ValueError(
                f"inplace_backward: expected logits with a last stride of 1 and no expanded dimension, "
                f"got strides {list(logits.stride())}"
            )
    if chosen == "eager" and not inplace_backward:
        logp, entropy = reference(_softcap.reference(logits, softcap, mask), ids, mask, temperature)
        return (logp, entropy) if with_entropy else logp
    if logits.stride(-1) != 1 and not inplace_backward:
        logits = logits.contiguous()
    if several:
        columns = (logits.reshape(-1, logits.shape[-1]), ids.reshape(-1, ids.shape[-1]))
        flat = (*columns, None if mask is None else mask.reshape(-1))
        logp, entropy = LogitsLogProbs.apply(*flat, temperature, softcap, with_entropy, chosen)
        return (logp.view(ids.shape), entropy.view(ids.shape[:-1])) if with_entropy else logp.view(ids.shape)
    if chosen != "eager" and not (logits.requires_grad and torch.is_grad_enabled()):
        results = log_probs_of_views([logits], ids, mask, [temperature], with_entropy, chosen, softcap)
        logp, _, entropy = as_one(results, ids.shape)
    else:
        logp, entropy = LogProbs.apply(logits, ids, mask, temperature, with_entropy, inplace_backward, chosen, softcap)
    return (logp, entropy) if with_entropy else logp
