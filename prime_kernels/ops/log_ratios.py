"""Token log-ratios of an implicit process reward model: q_t = log pi_prm(y_t | ..) - log pi_ref(y_t | ..)."""

from typing import NamedTuple

import torch
from torch import Tensor

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
    return reference(prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, chosen)
