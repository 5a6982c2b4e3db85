"""Launches of the loss kernels on checked tensors."""

import torch
from torch import Tensor

from prime_kernels._backends import PPOResults, PPOTokens, PRMResults
from prime_kernels._constants import PRM_PAIR_KINDS
from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column, mask_column
from prime_kernels._triton._launch import offsets, on_device, options, scan_config
from prime_kernels._triton._launch_config import ScanConfig
from prime_kernels._triton._ppo_kernels import ppo_backward_kernel, ppo_forward_kernel
from prime_kernels._triton._prm_kernels import prm_kernel

# Sums that each program publishes; responses that the last one processes at once, and scratch columns of each.
PPO_SUMS, RESPONSES, RESPONSE_COLUMNS = 4, 512, 3


def ppo_loss_and_scale(
    tokens: PPOTokens,
    clip: tuple[float, float],
    denominator: Tensor | float | None,
    config: ScanConfig | None = None,
) -> PPOResults:
    """(loss, clip_fraction, approx_kl, 1 / denominator) of (logp, old_logp, advantages, weights or None), [T] float32.

    Scalars, the last in float64, in one launch. ``denominator`` None is the number of valid tokens, at least 1.
    """
    logp, old_logp, advantages, weights, mask = _checked(tokens)
    total, device = logp.numel(), logp.device
    config = config or scan_config(total, device)
    loss, clip_fraction, approx_kl = (logp.new_empty(()) for _ in range(3))
    scale = logp.new_empty((), dtype=torch.float64)
    published = logp.new_empty(PPO_SUMS, config.slots, dtype=torch.float64)
    # Unused arguments repeat an existing tensor; the kernel does not read them.
    kind, number, by = "count", 1.0, scale
    if isinstance(denominator, Tensor):
        kind, by = "tensor", column(denominator, torch.float64, 1, device)
    elif denominator is not None:
        kind, number = "number", float(denominator)
    with on_device(device):
        ppo_forward_kernel[(config.programs,)](
            logp,
            old_logp,
            advantages,
            logp if weights is None else weights,
            logp if mask is None else mask,
            by,
            loss,
            clip_fraction,
            approx_kl,
            scale,
            published,
            arrivals(device),
            total,
            config.tiles,
            1.0 - clip[0],
            1.0 + clip[1],
            number,
            MASKED=mask is not None,
            WEIGHTED=weights is not None,
            DENOMINATOR=kind,
            **options(config),
        )
    return PPOResults(loss, clip_fraction, approx_kl, scale)


def ppo_gradient(
    tokens: PPOTokens,
    clip: tuple[float, float],
    scale: Tensor,
    grad: Tensor,
    config: ScanConfig | None = None,
) -> Tensor:
    """[T] float32: d loss / d logp times ``grad``, a float32 scalar; ``scale`` is that of the forward. One launch."""
    logp, old_logp, advantages, weights, mask = _checked(tokens)
    total, device = logp.numel(), logp.device
    out = torch.empty_like(logp)
    if total == 0:
        return out
    config = config or scan_config(total, device)
    with on_device(device):
        ppo_backward_kernel[(-(-total // config.block),)](
            logp,
            old_logp,
            advantages,
            logp if weights is None else weights,
            logp if mask is None else mask,
            column(scale, torch.float64, 1, device),
            column(grad, torch.float32, 1, device),
            out,
            total,
            1.0 - clip[0],
            1.0 + clip[1],
            MASKED=mask is not None,
            WEIGHTED=weights is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out


def prm_loss_and_slope(
    log_ratio: Tensor,
    outcomes: Tensor,
    cu_seqlens: Tensor,
    cu_groups: Tensor | None,
    kind: str,
    beta: float,
    config: ScanConfig | None = None,
) -> PRMResults:
    """(loss, pair accuracy, slope) of [T] float32 log-ratios and [B] float64 outcomes, in one launch.

    Two float32 scalars, and d loss / d Delta of each response, [B] float64. Without groups the accuracy is NaN.
    """
    total, device = log_ratio.numel(), log_ratio.device
    assert cu_groups is not None or kind not in PRM_PAIR_KINDS
    log_ratio, (cu_seqlens, responses) = column(log_ratio, torch.float32, total, device), offsets(cu_seqlens, device)
    outcomes = column(outcomes, torch.float64, responses, device)
    grouped = cu_groups is not None
    cu_groups, groups = (cu_seqlens, 0) if cu_groups is None else offsets(cu_groups, device)
    config = config or scan_config(total, device)
    loss, accuracy, slope = log_ratio.new_empty(()), log_ratio.new_empty(()), torch.empty_like(outcomes)
    deltas = outcomes.new_empty(RESPONSE_COLUMNS, responses)
    published = outcomes.new_empty(2, config.slots)
    with on_device(device):
        prm_kernel[(config.programs,)](
            log_ratio,
            outcomes,
            cu_seqlens,
            cu_groups,
            loss,
            accuracy,
            slope,
            deltas,
            published,
            arrivals(device),
            total,
            responses,
            groups,
            config.tiles,
            beta,
            KIND=kind,
            GROUPED=grouped,
            RESPONSES=RESPONSES,
            **options(config),
        )
    return PRMResults(loss, accuracy, slope)


def _checked(tokens: PPOTokens) -> PPOTokens:
    total, device = tokens.logp.numel(), tokens.logp.device
    logp, old_logp, advantages = (column(each, torch.float32, total, device) for each in tokens[:3])
    weights = column(tokens.weights, torch.float32, total, device)
    return PPOTokens(logp, old_logp, advantages, weights, mask_column(tokens.mask, total, device))
