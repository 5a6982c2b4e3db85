"""Rewards of reasoning steps from rewards of tokens.

"single": the sum over a step's tokens, Q_k - Q_{k-1}. "cumulative": Q_k, the sum from the start of the response to
the end of the step.
"""

import torch
from torch import Tensor

from prime_kernels import _checks, _dispatch
from prime_kernels._segment_math import result_dtype, segment_total
from prime_kernels.ops import segment_scan
from prime_kernels.ops.segment_scan import SegmentScan
from prime_kernels.ops.segment_sum import SegmentSum

MODES = ("single", "cumulative")


def reference(token_rewards: Tensor, cu_steps: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """Step sums in float64; for "cumulative" a running sum of them in each response."""
    rewards = segment_total(token_rewards, cu_steps)
    if mode == "cumulative":
        rewards = segment_scan.reference(rewards, owned_steps(cu_steps, cu_seqlens), 1.0, reverse=False)
    return rewards.to(result_dtype(token_rewards))


def owned_steps(cu_steps: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Offsets [B + 1] of each response's steps, counted in steps.

    A response owns the steps that start in it; empty steps at the very end belong to the last response.
    """
    owned = torch.searchsorted(cu_steps[:-1], cu_seqlens)
    owned[-1] = cu_steps.numel() - 1
    return owned


def step_rewards(
    token_rewards: Tensor, cu_steps: Tensor, cu_seqlens: Tensor, *, mode: str = "single", backend: str | None = None
) -> Tensor:
    """Reward of each reasoning step. Differentiable in ``token_rewards``.

    Args:
        token_rewards: [T], floating point, such as beta * log_ratio.
        cu_steps: [S + 1], int32 or int64: where steps start, from 0, non-decreasing, ending at T. Every offset of
            ``cu_seqlens`` must be among them: no step spans two responses. An empty step belongs to the response
            that starts or goes on at its offset.
        cu_seqlens: [B + 1], int32 or int64: where responses start, from 0, non-decreasing, ending at T.
        mode: "single" for the reward of the step alone, "cumulative" for the sum up to its end.
        backend: see :mod:`prime_kernels`.

    Returns:
        [S], float32 (float64 for float64 rewards).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or mode; bad offsets; a step that spans two responses.
        BackendUnavailable: the backend asked for cannot run this.

    Source: step scoring of arXiv 2412.01981 with exact boundaries.
    """
    _checks.floating("token_rewards", token_rewards, ndim=1)
    total = token_rewards.numel()
    cu_steps = _checks.offsets("cu_steps", cu_steps, total, "tokens", token_rewards, "token_rewards")
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, total, "tokens", token_rewards, "token_rewards")
    if cu_seqlens.numel() == 1 and cu_steps.numel() > 1:
        raise ValueError(f"cu_steps: expected no steps as cu_seqlens has no responses, got {cu_steps.numel() - 1}")
    _checks.nested("cu_steps", cu_steps, "cu_seqlens", cu_seqlens)
    _checks.choice("mode", mode, MODES)
    chosen = _dispatch.resolve("step_rewards", token_rewards, backend)
    if chosen == "eager":
        return reference(token_rewards, cu_steps, cu_seqlens, mode)
    rewards = SegmentSum.apply(token_rewards.float(), cu_steps, chosen)
    if mode == "cumulative":
        rewards = SegmentScan.apply(rewards, owned_steps(cu_steps, cu_seqlens), 1.0, False, chosen)
    return rewards.to(result_dtype(token_rewards))
