"""Mismatch between the engine's and the trainer's log-probs, and the importance weights that correct for it."""

from __future__ import annotations

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import Correction
from ..scale.transfer import Values


def importance(
    old_logp: Tensor,
    rollout_logp: Tensor,
    cap: float,
    mode: Correction = "token_truncate",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor | None, Values]:
    """Importance weights and metrics of a batch.

    Args:
        old_logp: [T] log-probs of the policy that is about to be updated, as the trainer computes them.
        rollout_logp: [T] those of the engine that sampled, at the same temperature.
        cap: C, 0 for no weights. With r = exp(old_logp - rollout_logp) of a token and R their product over a response:
        mode: `token_truncate` min(r, C); `token_mask` r, or 0 above C; `sequence_mask` R for every token of a response,
            or 0 above C. Masked tokens stay in the loss's denominator.
        cu_seqlens: [B + 1] where responses start, for `sequence_mask`.

    Returns:
        Weights [T] or None, and `mismatch` (mean of |old_logp - rollout_logp|), `mismatch_max`, `mismatch_kl` (the k3
        estimate of KL(rollout || trainer); Schulman 2020), `mismatch_ess` (effective
        sample size of the uncapped weights as a share of the tokens); and of what was cut: `tis_capped` (share of
        tokens above C that are truncated), `tis_masked` (share of masked tokens) and `tis_masked_responses`.
    """
    gap = (old_logp - rollout_logp).double()
    if not len(gap):
        return (None if cap == 0 else gap.float()), {}
    ratio = gap.exp()
    metrics: Values = {
        "mismatch": gap.abs().mean(),
        "mismatch_max": gap.abs().max(),
        "mismatch_kl": (ratio - 1 - gap).mean(),
        "mismatch_ess": ratio.sum().square() / ratio.square().sum() / len(ratio),
    }
    if cap == 0 or mode == "off":
        return None, metrics
    if mode == "token_truncate":
        return ratio.clamp(max=cap).float(), metrics | {"tis_capped": _share(ratio > cap)}
    if mode == "sequence_mask":
        if cu_seqlens is None:
            raise ValueError("cu_seqlens: expected the offsets of responses for mode='sequence_mask', got None")
        products = pk.segment_sum(gap, cu_seqlens).exp()
        metrics["tis_masked_responses"] = _share(products > cap)
        ratio = torch.repeat_interleave(products, cu_seqlens.diff(), output_size=len(gap))
    masked = ratio > cap
    return ratio.masked_fill(masked, 0.0).float(), metrics | {"tis_masked": _share(masked)}


def _share(chosen: Tensor) -> Tensor:
    return chosen.double().mean()
