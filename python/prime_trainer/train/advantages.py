"""RLOO advantages of a batch from outcomes and, where there is a PRM, process rewards."""

from __future__ import annotations

from torch import Tensor

import prime_kernels as pk

from ..config.sections import AlgorithmConfig
from .batch import Batch
from .prm_step import Rewards


def advantages_of(batch: Batch, rewards: Rewards | None, cfg: AlgorithmConfig) -> Tensor:
    """[T] in packed order; `rewards` None is outcome-only RLOO."""
    return pk.rloo_advantages(
        None if rewards is None else rewards.values, batch.outcomes, batch.cu_seqlens, batch.cu_groups,
        reward_mask=None if rewards is None else rewards.mask,
        gamma_process=cfg.gamma_process, gamma_outcome=cfg.gamma_outcome,
        process_coef=cfg.process_coef, outcome_coef=cfg.outcome_coef,
        normalize_process=cfg.normalize_process, process_baseline=cfg.process_baseline, whiten=cfg.whiten,
    ).advantages  # fmt: skip
