"""Advantages of a batch from outcomes and, where there is a PRM, process rewards.

With a_i the outcome of response i of n in its group, s_{i,t} the process reward of a token, L_i a response's tokens:

    outcome, on the last token   rloo       a_i - mean_{j != i} a_j
                                 grpo       (a_i - mean a) / (std a + 1e-6), std unbiased, over the group
                                 reinforce  a_i
    its return                   gamma_outcome^(L_i - t) times that
    process return  sum          as in `prime_kernels.rloo_advantages`
                    min          min_{u >= t} s_{i,u} - mean_{j != i} min_u s_{j,u}
                    gae          sum_{u >= t} (gamma_process * gae_lambda)^(u - t) d_{i,u}

d is s / (std V + 1e-6), V the running sums of s over the whole batch, standardised once more over the tokens of its
group: (d - mean) / (std + 1e-6). Tokens without a process reward are in no mean, deviation or minimum, and the others
come before them as if they were not there. `normalize_process` divides `sum` and `min` by the largest absolute return
of the batch + 1e-6. Each source may be whitened, or their sum.

Sources: arXiv 2502.01456 (rloo, sum), 2402.03300 (grpo), 2501.03262 (reinforce: REINFORCE++ with `whiten`, without
its KL in the reward), 2504.15275 (min, but not its baseline, which is our own), 1506.02438 and 2604.13197
(gae). Every rank has the whole batch: nothing here depends on ranks or micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import AlgorithmConfig
from .batch import Batch
from .prm_step import Rewards

_EPS = 1e-6


def advantages_of(batch: Batch, rewards: Rewards | None, cfg: AlgorithmConfig) -> Tensor:
    """[T] float32 in packed order; `rewards` None is outcomes alone."""
    by_source = cfg.whiten and cfg.whiten_of == "source"
    fused = cfg.estimator == "rloo" and cfg.process_return == "sum"
    if fused and not by_source:
        return _rloo(batch, rewards, cfg, whiten=cfg.whiten)
    parts = [(cfg.outcome_coef, outcome_returns(batch, cfg))]
    if rewards is not None:
        parts.append((cfg.process_coef, process_returns(batch, rewards, cfg)))
    if by_source:
        parts = [(coef, whitened(values, batch)) for coef, values in parts]
    total = torch.stack([coef * values for coef, values in parts]).sum(0)
    return whitened(total, batch) if cfg.whiten and not by_source else total


def outcome_returns(batch: Batch, cfg: AlgorithmConfig) -> Tensor:
    """[T], without `outcome_coef`."""
    if cfg.estimator == "rloo":
        return _rloo(batch, None, cfg.model_copy(update={"outcome_coef": 1.0}), whiten=False)
    values = batch.outcomes.double()
    if cfg.estimator == "grpo":
        group, counted = _groups(batch), batch.cu_seqlens.diff() > 0
        values = _standardised(values, group, counted, len(batch.groups))
    placed = torch.zeros(batch.num_tokens, dtype=torch.float64, device=batch.device)
    placed[batch.last_tokens] = values[batch.answered]
    return pk.segment_scan(placed, batch.cu_seqlens, gamma=cfg.gamma_outcome, reverse=True).float()


def process_returns(batch: Batch, rewards: Rewards, cfg: AlgorithmConfig) -> Tensor:
    """[T], without `process_coef`."""
    if cfg.process_return == "sum":
        alone = cfg.model_copy(update={"process_coef": 1.0, "outcome_coef": 0.0})
        return _rloo(batch, rewards, alone, whiten=False)
    values = rewards.values.double()
    has = torch.ones_like(values, dtype=torch.bool) if rewards.mask is None else rewards.mask
    found = _minima(batch, values, has, cfg) if cfg.process_return == "min" else _gae(batch, rewards, has, cfg)
    return found.float()


def whitened(values: Tensor, batch: Batch) -> Tensor:
    """[T] of mean 0 and unbiased variance 1 over the batch, by the kernel that whitens RLOO's returns: of groups of one
    without discount, returns are the values themselves."""
    alone = torch.arange(batch.num_responses + 1, device=batch.device)
    return pk.rloo_advantages(
        values, torch.zeros_like(batch.outcomes), batch.cu_seqlens, alone, gamma_process=0.0, normalize_process=False
    ).advantages


def _rloo(batch: Batch, rewards: Rewards | None, cfg: AlgorithmConfig, *, whiten: bool) -> Tensor:
    return pk.rloo_advantages(
        None if rewards is None else rewards.values, batch.outcomes, batch.cu_seqlens, batch.cu_groups,
        reward_mask=None if rewards is None else rewards.mask,
        gamma_process=cfg.gamma_process, gamma_outcome=cfg.gamma_outcome,
        process_coef=cfg.process_coef, outcome_coef=cfg.outcome_coef,
        normalize_process=cfg.normalize_process, process_baseline=cfg.process_baseline, whiten=whiten,
        total=batch.num_tokens,
    ).advantages  # fmt: skip


def value_deviation(batch: Batch, rewards: Rewards) -> Tensor:
    """std V + 1e-6, a float64 scalar: V are the running sums of the process rewards, over the whole batch."""
    running = pk.segment_scan(rewards.values.double(), batch.cu_seqlens)
    if rewards.places is not None:
        running = running[rewards.places]
    return (running.std() if running.numel() > 1 else running.new_zeros(())) + _EPS


def _minima(batch: Batch, values: Tensor, has: Tensor, cfg: AlgorithmConfig) -> Tensor:
    filled = values.masked_fill(~has, torch.inf)
    padded = pk.unpack(filled, batch.cu_seqlens, length=batch.longest(), fill=torch.inf)
    future = padded.flip(1).cummin(1).values.flip(1) if padded.numel() else padded
    minima = pk.pack(future, batch.cu_seqlens, total=batch.num_tokens)
    # After a response's last reward there is nothing to blame or to praise.
    minima = minima.masked_fill(minima == torch.inf, 0.0)
    if cfg.normalize_process and batch.num_tokens:
        minima = minima / (minima.abs().max() + _EPS)
    response = _responses(batch)
    whole = torch.zeros(batch.num_responses, dtype=torch.float64, device=batch.device)
    whole[batch.answered] = minima[batch.cu_seqlens[:-1][batch.answered]]
    # The mean of the others' minima, by the kernel that centres outcomes: m_i - (m_i - mean_{j != i} m_j).
    centred = pk.rloo_advantages(
        None, whole, batch.cu_seqlens, batch.cu_groups, whiten=False, total=batch.num_tokens
    ).advantages
    return minima - whole[response] + centred


def _gae(batch: Batch, rewards: Rewards, has: Tensor, cfg: AlgorithmConfig) -> Tensor:
    group = _groups(batch)[_responses(batch)]
    scaled = rewards.values.double() / value_deviation(batch, rewards)
    deltas = _standardised(scaled, group, has, len(batch.groups)).masked_fill(~has, 0.0)
    return pk.segment_scan(deltas, batch.cu_seqlens, gamma=cfg.gamma_process * cfg.gae_lambda, reverse=True)


def _standardised(values: Tensor, group: Tensor, counted: Tensor, groups: int) -> Tensor:
    """(value - mean) / (unbiased std + 1e-6) over the counted values of its group; 0 for one value alone."""

    def total(terms: Tensor) -> Tensor:
        return terms.new_zeros(groups).index_add_(0, group, terms.masked_fill(~counted, 0.0))

    count = total(torch.ones_like(values))
    centred = values - (total(values) / count.clamp(min=1))[group]
    deviation = (total(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    return centred / (deviation + _EPS)[group]


def _groups(batch: Batch) -> Tensor:
    """[B] the group of each response."""
    return torch.repeat_interleave(batch.cu_groups.diff(), output_size=batch.num_responses)


def _responses(batch: Batch) -> Tensor:
    """[T] the response of each token."""
    return torch.repeat_interleave(batch.cu_seqlens.diff(), output_size=batch.num_tokens)
