"""Mismatch between the engine's and the trainer's log-probs, and the importance weights that correct for it."""

from __future__ import annotations

from torch import Tensor


def importance(old_logp: Tensor, rollout_logp: Tensor, cap: float) -> tuple[Tensor | None, dict[str, float]]:
    """Truncated importance weights and metrics of a batch.

    Args:
        old_logp: [T] log-probs of the policy that is about to be updated, as the trainer computes them.
        rollout_logp: [T] those of the engine that sampled, at the same temperature.
        cap: the weights are min(exp(old_logp - rollout_logp), cap); 0 for none.

    Returns:
        Weights [T] or None, and `mismatch` (mean of |old_logp - rollout_logp|), `mismatch_max`, `mismatch_kl` (the k3
        estimate of KL(rollout || trainer); Schulman 2020), `mismatch_ess` (effective
        sample size of the uncapped weights as a share of the tokens) and `tis_capped` (share of weights at the cap).
    """
    gap = (old_logp - rollout_logp).double()
    if not len(gap):
        return (None if cap == 0 else gap.float()), {}
    ratio = gap.exp()
    metrics = {
        "mismatch": gap.abs().mean().item(),
        "mismatch_max": gap.abs().max().item(),
        "mismatch_kl": (ratio - 1 - gap).mean().item(),
        "mismatch_ess": (ratio.sum().square() / ratio.square().sum() / len(ratio)).item(),
    }
    if cap == 0:
        return None, metrics
    return ratio.clamp(max=cap).float(), metrics | {"tis_capped": (ratio > cap).double().mean().item()}
