"""Returns and advantages of PRIME: leave-one-out baselines on outcome and process rewards, summed, then whitened.

With n responses in a group, s_{i,t} the process reward of a token, m_i its mean over response i:

    outcome, on the last token:   a_i - mean_{j != i} a_j
    process, "reference":         s_{i,t} * n / (n - 1) - sum_j m_j / (n - 1)
    process, "paper":             s_{i,t} - sum_{j != i} m_j / (n - 1)
    return of each source:        G_t = reward_t + gamma * G_{t+1}
    returns = process_coef * G_process + outcome_coef * G_outcome
    advantages = (returns - mean) * rsqrt(unbiased variance + 1e-8), over all tokens

The two process baselines differ by (s_{i,t} - m_i) / (n - 1), which sums to zero over a response.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._backends import RlooBatch, RlooSettings
from prime_kernels._constants import NORMALIZE_EPS, WHITEN_EPS
from prime_kernels._segment_math import indexed_total, leave_one_out, merge_moments, result_dtype, segment_index
from prime_kernels.ops import segment_scan

PROCESS_BASELINES = ("reference", "paper")


class Advantages(NamedTuple):
    """Returns and advantages of each token, [T], without gradient."""

    returns: Tensor
    advantages: Tensor


def reference(batch: RlooBatch, settings: RlooSettings, whiten: bool, process_group: Any) -> Advantages:
    """All in float64, so that float32 results do not depend on the order of the responses."""
    process_rewards, reward_mask, outcomes, cu_seqlens, cu_groups, total = batch
    token_response = segment_index(cu_seqlens, total)
    outcomes, not_empty = outcomes.double(), cu_seqlens.diff() > 0
    centred = outcomes - leave_one_out(outcomes, not_empty, cu_groups)[0]
    last = torch.arange(total, dtype=torch.int64, device=outcomes.device) == cu_seqlens[1:][token_response] - 1
    of_outcomes = _returns(centred[token_response].where(last, 0.0), cu_seqlens, settings.gamma_outcome)
    returns = settings.outcome_coef * of_outcomes

    if process_rewards is not None:
        scores = process_rewards.double()
        has_reward = torch.ones_like(scores, dtype=torch.bool) if reward_mask is None else reward_mask
        scores = scores.where(has_reward, 0.0)
        if settings.normalize_process:
            scores = scores / (_largest_return(scores, cu_seqlens, process_group) + NORMALIZE_EPS)
        responses = outcomes.numel()
        rewarded = indexed_total(has_reward, token_response, responses)
        means = indexed_total(scores, token_response, responses) / rewarded.clamp(min=1.0)
        baseline, others = leave_one_out(means, rewarded > 0, cu_groups)
        if settings.process_baseline == "reference":
            # The same as in the formula: s * n/(n-1) - sum_j m_j/(n-1) = s - others' mean + (s - m_i)/(n-1).
            excess = (scores - means[token_response]) / others.clamp(min=1.0)[token_response]
            scores = scores + excess.where((others > 0)[token_response], 0.0)
        rewards = (scores - baseline[token_response]).where(has_reward, 0.0)
        returns = returns + settings.process_coef * _returns(rewards, cu_seqlens, settings.gamma_process)

    advantages = _whitened(returns, process_group) if whiten else returns
    return Advantages(returns, advantages)


def fused(backend: str, batch: RlooBatch, settings: RlooSettings, whiten: bool, process_group: Any) -> Advantages:
    """The same by a backend's kernels. Returns are float32, sums and moments float64."""
    kernels = _backends.packed(backend)
    process_rewards = None if batch.process_rewards is None else batch.process_rewards.float()
    batch = batch._replace(process_rewards=process_rewards, outcomes=batch.outcomes.double())
    over_ranks = None if process_group is None else lambda largest: _all_reduce_max(largest, process_group)
    returns, moments = kernels.rloo_returns(batch, settings, over_ranks)
    if backend == "cpu" and process_rewards is not None and not moments.isfinite().all():
        # Finite rewards rarely overflow: only now look for a reward that is not finite.
        _checks.finite("process_rewards", process_rewards, batch.reward_mask)
    if not whiten:
        return Advantages(returns, returns.clone())
    if process_group is not None:
        moments = _gathered(merge_moments(moments), process_group)
    return Advantages(returns, kernels.whiten(returns, moments))


def _gathered(values: Tensor, process_group: Any) -> Tensor:
    """[ranks, ...]: the values of each rank."""
    ranks = [torch.empty_like(values) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(ranks, values.contiguous(), group=process_group)
    return torch.stack(ranks)


def _all_reduce_max(value: Tensor, process_group: Any) -> None:
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=process_group)


def _returns(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    return segment_scan.reference(rewards, cu_seqlens, gamma, reverse=True)


def _largest_return(scores: Tensor, cu_seqlens: Tensor, process_group: Any) -> Tensor:
    """max |sum_{u >= t} s_{i,u}| over the tokens of every rank."""
    sums = _returns(scores, cu_seqlens, 1.0).abs()
    largest = torch.cat((sums, sums.new_zeros(1))).max()
    if process_group is not None:
        _all_reduce_max(largest, process_group)
    return largest


def _whitened(values: Tensor, process_group: Any) -> Tensor:
    """Zero mean and unit variance over the tokens of all ranks: first the mean, then the squares about it."""

    def total(*terms: Tensor) -> Tensor:
        sums = torch.stack(terms)
        if process_group is not None:
            dist.all_reduce(sums, group=process_group)
        return sums

    count, summed = total(values.new_full((), values.numel()), values.sum())
    centred = values - summed / count.clamp(min=1.0)
    (squares,) = total(centred.square().sum())
    variance = squares / (count - 1.0).clamp(min=1.0)
    return centred * torch.rsqrt(variance + WHITEN_EPS)


def _checked(batch: RlooBatch, total: int | None, backend: str) -> RlooBatch:
    """The batch with int64 offsets and its number of tokens, after all checks that read values; ``total`` None is read
    from the offsets."""
    process_rewards, mask, outcomes, cu_seqlens, cu_groups, _ = batch
    if outcomes.is_cuda and backend in ("triton", "cuda"):
        batch = _backends.packed_on_gpu(backend).checked_batch(batch)
        if process_rewards is None and total is not None:
            _checks.ends("cu_seqlens", batch.cu_seqlens, total, "tokens")
    else:
        cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, total, "tokens", outcomes, "outcomes")
        cu_groups = _checks.offsets("cu_groups", cu_groups, outcomes.numel(), "responses", outcomes, "outcomes")
        _checks.finite("outcomes", outcomes)
        # On "cpu" the moments of the returns show whether all rewards were finite.
        if process_rewards is not None and backend != "cpu":
            _checks.finite("process_rewards", process_rewards, mask)
        batch = batch._replace(cu_seqlens=cu_seqlens, cu_groups=cu_groups)
    if total is None:
        batch = batch._replace(total=int(batch.cu_seqlens[-1]))
    return batch


def rloo_advantages(
    process_rewards: Tensor | None,
    outcomes: Tensor,
    cu_seqlens: Tensor,
    cu_groups: Tensor,
    *,
    gamma_process: float = 1.0,
    gamma_outcome: float = 1.0,
    process_coef: float = 1.0,
    outcome_coef: float = 1.0,
    normalize_process: bool = True,
    process_baseline: str = "reference",
    whiten: bool = True,
    process_group: Any = None,
    reward_mask: Tensor | None = None,
    total: int | None = None,
    backend: str | None = None,
) -> Advantages:
    """Token returns and whitened advantages from process and outcome rewards. Targets: computed without gradient.

    The formulas are at the top of this file. Where they do not apply:

    * A response without tokens contributes nothing: it counts neither in its group's n nor in any baseline.
    * A group of one response has no others: its baseline is 0.
    * Whitening one token, or equal returns, gives advantage 0.

    Args:
        process_rewards: [T], floating point and finite: the reward of each response token; None for outcomes alone.
        outcomes: [B], floating point and finite: the verified outcome of each response, usually in [0, 1].
        cu_seqlens: [B + 1], int32 or int64: where responses start, from 0, non-decreasing, ending at T.
        cu_groups: [G + 1], int32 or int64: where prompt groups start, counted in responses, ending at B. A group lies
            on one rank.
        gamma_process, gamma_outcome: discounts of the two returns, in [0, 1].
        process_coef, outcome_coef: finite factors of the two returns.
        normalize_process: first divide the process rewards by max |sum_{u >= t} s_{i,u}| + 1e-6 over the whole batch,
            which cancels their scale.
        process_baseline: "reference" or "paper".
        whiten: False leaves advantages = returns.
        process_group: a torch.distributed group over which the maximum and the whitening sums are taken. Every rank
            must call, also with no tokens. None: this process alone.
        reward_mask: [T], bool: the tokens that have a process reward, such as the last of each step; None for all. The
            others have process reward 0 (not read), get no baseline, and do not count in m_i.
        total: T. With ``process_rewards`` it is known; without, None reads it from ``cu_seqlens``, waiting for the
            device once.
        backend: see :mod:`prime_kernels`.

    Returns:
        Advantages(returns, advantages), [T] each: float32, or float64 if ``process_rewards`` (without it: ``outcomes``)
        is.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, bad offsets, NaN or infinite rewards, an option out of range.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2502.01456, section 3 and equation 5; leave-one-out as in arXiv 2402.14740.
    """
    _checks.floating("outcomes", outcomes, ndim=1)
    rewards = outcomes
    if process_rewards is not None:
        rewards = _checks.floating("process_rewards", process_rewards, ndim=1)
        _checks.device("process_rewards", process_rewards, outcomes, "outcomes")
    cu_seqlens = _checks.offsets_unread("cu_seqlens", cu_seqlens, outcomes, "outcomes")
    _checks.shape("outcomes", outcomes, (cu_seqlens.numel() - 1,), "the responses of cu_seqlens")
    cu_groups = _checks.offsets_unread("cu_groups", cu_groups, outcomes, "outcomes")
    if reward_mask is not None and process_rewards is None:
        raise ValueError("reward_mask: expected None as process_rewards is None, got a mask")
    if process_rewards is not None:
        _checks.mask(reward_mask, process_rewards, "process_rewards", name="reward_mask")
    gamma_process = _checks.number("gamma_process", gamma_process, 0.0, 1.0)
    gamma_outcome = _checks.number("gamma_outcome", gamma_outcome, 0.0, 1.0)
    process_coef = _checks.number("process_coef", process_coef, -math.inf, math.inf)
    outcome_coef = _checks.number("outcome_coef", outcome_coef, -math.inf, math.inf)
    _checks.flag("normalize_process", normalize_process)
    _checks.flag("whiten", whiten)
    _checks.choice("process_baseline", process_baseline, PROCESS_BASELINES)
    chosen = _dispatch.resolve("rloo_advantages", rewards, backend)
    settings = RlooSettings(
        gamma_process, gamma_outcome, process_coef, outcome_coef, normalize_process, process_baseline
    )
    total = _checks.size("total", total)
    if process_rewards is not None:
        if total not in (None, process_rewards.numel()):
            raise ValueError(f"total: expected the {process_rewards.numel()} tokens of process_rewards, got {total}")
        total = process_rewards.numel()
    given = RlooBatch(process_rewards, reward_mask, outcomes, cu_seqlens, cu_groups, total or 0)
    batch = _checked(given, total, chosen)
    with torch.no_grad():
        if chosen == "eager":
            result = reference(batch, settings, whiten, process_group)
        else:
            result = fused(chosen, batch, settings, whiten, process_group)
    return Advantages(*(values.to(result_dtype(rewards)) for values in result))
