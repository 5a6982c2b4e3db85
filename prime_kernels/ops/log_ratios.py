"""Token log-ratios of an implicit process reward model: q_t = log pi_prm(y_t | ..) - log pi_ref(y_t | ..)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import RowGradient
from prime_kernels.ops import _softcap
from prime_kernels.ops import log_probs as rows

# The order of the models in lists.
PRM, REF, POLICY = 0, 1, 2


class LogRatios(NamedTuple):
    """Log-ratio and token log-probabilities, each [...]; ``policy_logp`` is None where no policy was given."""

    log_ratio: Tensor
    prm_logp: Tensor
    ref_logp: Tensor
    policy_logp: Tensor | None


def reference(
    models: Sequence[Tensor], ids: Tensor, mask: Tensor | None, temperatures: Sequence[float]
) -> list[Tensor]:
    """Each model separately, in float32 or float64: equal logits give equal numbers."""
    return [rows.reference(z, ids, mask, temperature)[0] for z, temperature in zip(models, temperatures, strict=True)]


class LogRatiosOnePass(torch.autograd.Function):
    """Log-probabilities of two or three models in one pass over their rows; the reference model gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        mask: Tensor | None,
        temperatures: Sequence[float],
        backend: str,
        softcap: float | None,
        *models: Tensor,
    ) -> tuple[Tensor, ...]:
        results = rows.log_probs_of_views(models, ids, mask, temperatures, False, backend, softcap)
        wanted = [z if need else None for z, need in zip(models, ctx.needs_input_grad[5:], strict=True)]
        ctx.save_for_backward(ids, mask, results.lse, *wanted)
        ctx.temperatures, ctx.backend, ctx.softcap = temperatures, backend, softcap
        ctx.set_materialize_grads(False)
        outputs = [rows.of_model(results.logp, place, ids.shape) for place in range(len(models))]
        ctx.mark_non_differentiable(outputs[REF])
        return tuple(outputs)

    @staticmethod
    @first_derivative_only("log_ratios")
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        ids, mask, lse, *models = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(models)
        for place, (z, grad) in enumerate(zip(models, grads, strict=True)):
            if z is None or grad is None or place == REF:
                continue
            out = gradients[place] = _backends.empty_like(z, ctx.backend)
            gradient = RowGradient(lse[place], None, grad, None)
            rows.gradient_of_views(z, ids, mask, gradient, ctx.temperatures[place], out, ctx.backend, ctx.softcap)
        return None, None, None, None, None, *gradients


def check(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
    backend: str | None,
) -> tuple[list[Tensor], Tensor, list[float], str]:
    """(models, ids, temperatures, backend) of arguments that have passed every check."""
    rows.check_logits("prm_logits", prm_logits)
    others = {"ref_logits": ref_logits} | ({} if policy_logits is None else {"policy_logits": policy_logits})
    for name, logits in others.items():
        rows.check_logits(name, logits)
        _checks.like(name, logits, prm_logits, "prm_logits")
    ids = rows.check_arguments(prm_logits, ids, mask, name="prm_logits", vocabulary=prm_logits.shape[-1])
    policy_temperature = rows.check_temperature("policy_temperature", policy_temperature)
    models = [logits for logits in (prm_logits, ref_logits, policy_logits) if logits is not None]
    widest = next((logits for logits in models if logits.dtype == torch.float64), prm_logits)
    chosen = _dispatch.resolve("log_ratios", widest, backend)
    return models, ids, [1.0, 1.0, policy_temperature][: len(models)], chosen


def log_ratios(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    *,
    policy_logits: Tensor | None = None,
    mask: Tensor | None = None,
    policy_temperature: float = 1.0,
    softcap: float | None = None,
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
        softcap: above 0, caps the logits of all models as in :func:`prime_kernels.log_probs`; None for no cap.
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
    softcap = _softcap.check_softcap("softcap", softcap)
    if torch.compiler.is_compiling():
        # One node of the graph, which checks its arguments and selects its backend at run time.
        arguments = (prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, softcap, backend)
        prm_logp, ref_logp, policy_logp, *_ = torch.ops.prime_kernels.log_ratios(*arguments)
        ref_logp = ref_logp.detach()
        return LogRatios(prm_logp - ref_logp, prm_logp, ref_logp, None if policy_logits is None else policy_logp)
    models, ids, temperatures, chosen = check(
        prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, backend
    )
    models[REF] = models[REF].detach()
    if chosen == "eager":
        logp = reference([_softcap.reference(z, softcap, mask) for z in models], ids, mask, temperatures)
    else:
        dense = [z if z.stride(-1) == 1 else z.contiguous() for z in models]
        if torch.is_grad_enabled() and any(z.requires_grad for z in models):
            logp = LogRatiosOnePass.apply(ids, mask, temperatures, chosen, softcap, *dense)
        else:
            results = rows.log_probs_of_views(dense, ids, mask, temperatures, False, chosen, softcap)
            logp = [rows.of_model(results.logp, place, ids.shape) for place in range(len(models))]
    return LogRatios(logp[PRM] - logp[REF], logp[PRM], logp[REF], logp[POLICY] if len(logp) > POLICY else None)
