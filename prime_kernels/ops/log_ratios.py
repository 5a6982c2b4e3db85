"""Token log-ratios of an implicit process reward model: q_t = log pi_prm(y_t | ..) - log pi_ref(y_t | ..)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prime_kernels import _checks, _dispatch
from prime_kernels.ops import log_probs as rows


class LogRatios(NamedTuple):
    """Log-ratio and token log-probabilities, each [...]; ``policy_logp`` is None where no policy was given."""

    log_ratio: Tensor
    prm_logp: Tensor
    ref_logp: Tensor
    policy_logp: Tensor | None


def reference(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
    backend: str = "eager",
) -> LogRatios:
    """Each model by itself: the ratio is taken in float32, and equal logits give exactly 0."""

    def logp(logits: Tensor, temperature: float) -> Tensor:
        return rows.run(logits, ids, mask, temperature, with_entropy=False, inplace_backward=False, backend=backend)[0]

    prm_logp = logp(prm_logits, 1.0)
    with torch.no_grad():
        ref_logp = logp(ref_logits, 1.0)
    policy_logp = None if policy_logits is None else logp(policy_logits, policy_temperature)
    return LogRatios(prm_logp - ref_logp, prm_logp, ref_logp, policy_logp)


class _OneLaunch(torch.autograd.Function):
    """Log-probabilities of two or three models in one pass over their rows; the reference model gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        prm_logits: Tensor,
        ref_logits: Tensor,
        policy_logits: Tensor | None,
        ids: Tensor,
        mask: Tensor | None,
        policy_temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        models = [logits for logits in (prm_logits, ref_logits, policy_logits) if logits is not None]
        temperatures = [1.0, 1.0, policy_temperature][: len(models)]
        log_ratios_forward = rows.kernels("triton").log_ratios_forward
        parts, start = [], 0
        flat_ids, flat_mask = ids.reshape(-1), None if mask is None else mask.reshape(-1)
        for views in rows.row_views(*models):
            piece = slice(start, start + views[0].shape[0])
            row_mask = None if flat_mask is None else flat_mask[piece]
            parts.append(log_ratios_forward(views, flat_ids[piece], row_mask, temperatures))
            start = piece.stop
        logp, lse = parts[0] if len(parts) == 1 else (torch.cat(column, 1) for column in zip(*parts, strict=True))
        ctx.save_for_backward(prm_logits, policy_logits, ids, mask, lse)
        ctx.policy_temperature = policy_temperature
        ctx.set_materialize_grads(False)
        # Copies, because a view of one tensor made here could not be changed in place by the caller.
        outputs = [column.view(ids.shape).clone() for column in logp]
        ctx.mark_non_differentiable(outputs[1])
        return outputs[0], outputs[1], outputs[2] if policy_logits is not None else None

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_prm: Tensor | None, grad_ref: Tensor | None, grad_policy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        prm_logits, policy_logits, ids, mask, lse = ctx.saved_tensors
        gradients: list[Tensor | None] = [None, None, None]
        for place, logits, grad, temperature in (
            (0, prm_logits, grad_prm, 1.0),
            (2, policy_logits, grad_policy, ctx.policy_temperature),
        ):
            if grad is None or not ctx.needs_input_grad[place]:
                continue
            gradients[place] = torch.empty_like(logits, memory_format=torch.contiguous_format)
            rows.kernel_backward(
                logits, ids, mask, lse[place], None, grad, None, temperature, gradients[place], "triton"
            )
        return *gradients, None, None, None


def one_launch(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
) -> LogRatios:
    """The Triton kernels, which take all models at once."""
    dense = [
        logits if logits is None or logits.stride(-1) == 1 else logits.contiguous()
        for logits in (prm_logits, ref_logits, policy_logits)
    ]
    prm_logp, ref_logp, policy_logp = _OneLaunch.apply(*dense, ids, mask, policy_temperature)
    return LogRatios(prm_logp - ref_logp, prm_logp, ref_logp, policy_logp)


def log_ratios(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    *,
    policy_logits: Tensor | None = None,
    mask: Tensor | None = None,
    policy_temperature: float = 1.0,
    backend: str | None = None,
) -> LogRatios:
    """Log-ratio of two models on the same tokens, with the log-probabilities of up to three models.

    log_ratio = prm_logp - ref_logp. Bitwise equal logits give exactly 0. Differentiable in ``prm_logits`` and
    ``policy_logits``; the reference model gets no gradient. The process reward of a token is beta * log_ratio.

    Args:
        prm_logits: [..., V], as in :func:`prime_kernels.log_probs`.
        ref_logits: [..., V] with the same leading dimensions and vocabulary; its dtype may differ.
        ids: [...], int32 or int64, in [0, V).
        policy_logits: [..., V] as well, or None.
        mask: [...], bool, or None for all. Where False every result is exactly 0 and nothing is read.
        policy_temperature: above 0, divides the logits of the policy alone.
        backend: see :mod:`prime_kernels`.

    Returns:
        LogRatios of [...], float32, or float64 where the logits are; ``policy_logp`` is None without ``policy_logits``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or temperature.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2412.01981 (the implicit reward) and arXiv 2502.01456, section 2.
    """
    rows.check_logits("prm_logits", prm_logits)
    for name, logits in (("ref_logits", ref_logits), ("policy_logits", policy_logits)):
        if logits is not None or name == "ref_logits":
            rows.check_logits(name, logits)
            _checks.like(name, logits, prm_logits, "prm_logits")
    ids = rows.check_arguments(prm_logits, ids, mask, name="prm_logits", vocabulary=prm_logits.shape[-1])
    policy_temperature = rows.check_temperature("policy_temperature", policy_temperature)
    given = [logits for logits in (prm_logits, ref_logits, policy_logits) if logits is not None]
    widest = next((logits for logits in given if logits.dtype == torch.float64), prm_logits)
    chosen = _dispatch.resolve("log_ratios", widest, backend)
    if chosen == "triton":
        return one_launch(prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature)
    return reference(prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, chosen)
