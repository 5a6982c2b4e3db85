"""Launches of the loss kernels on checked tensors."""

import torch
from torch import Tensor

from prime_kernels._backends import ClipRange, PPOResults, PPOTokens, PRMBatch, PRMResults
from prime_kernels._constants import PRM_PAIR_KINDS
from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column, mask_column
from prime_kernels._triton._launch import launch_phases, offsets, on_device, options, scan_config
from prime_kernels._triton._launch_config import PREFIX_TUNING, ScanConfig
from prime_kernels._triton._ppo_kernels import ppo_backward_kernel, ppo_forward_kernel
from prime_kernels._triton._prefix_kernels import prefix_kernel
from prime_kernels._triton._prm_kernels import prm_kernel

# Sums that each program publishes; responses that the last one processes at once, and scratch columns of each.
PPO_SUMS, RESPONSES, RESPONSE_COLUMNS = 4, 512, 3


def ppo_loss_and_scale(
    tokens: PPOTokens,
    clip: ClipRange,
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
            1.0 - clip.low,
            1.0 + clip.high,
            clip.ceiling,
            number,
            MASKED=mask is not None,
            WEIGHTED=weights is not None,
            DENOMINATOR=kind,
            **options(config),
        )
    return PPOResults(loss, clip_fraction, approx_kl, scale)


def ppo_gradient(
    tokens: PPOTokens,
    clip: ClipRange,
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
            1.0 - clip.low,
            1.0 + clip.high,
            clip.ceiling,
            MASKED=mask is not None,
            WEIGHTED=weights is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out


def prm_loss_and_slope(batch: PRMBatch, kind: str, beta: float, config: ScanConfig | None = None) -> PRMResults:
    """(loss, pair accuracy, slope), in one launch: the slope is d loss / d Delta of each response, [B] float64."""
    assert batch.cu_groups is not None or kind not in PRM_PAIR_KINDS
    config = config or scan_config(batch.log_ratio.numel(), batch.log_ratio.device)
    launch = _PRMLaunch(batch, config, rows=2)
    slope = torch.empty_like(launch.outcomes)
    with on_device(slope.device):
        arguments = launch.arguments(slope, beta)
        prm_kernel[(config.programs,)](*arguments, KIND=kind, **launch.constants, **options(config))
    return PRMResults(launch.loss, launch.accuracy, slope)


def prefix_loss_and_slope(batch: PRMBatch, beta: float, margin: float, config: ScanConfig | None = None) -> PRMResults:
    """(loss, pair accuracy, slope), in one launch: the slope is d loss / d (sum up to each token), [T] float32."""
    config = config or scan_config(batch.log_ratio.numel(), batch.log_ratio.device, PREFIX_TUNING)
    launch = _PRMLaunch(batch, config, rows=3)
    slope = torch.empty_like(launch.log_ratio)
    with on_device(slope.device):
        arguments = (*launch.arguments(slope, beta), margin)
        launch_phases(prefix_kernel, config, arguments, 0, 1, **launch.constants)
    return PRMResults(launch.loss, launch.accuracy, slope)


class _PRMLaunch:
    """What the launches of the PRM losses share: columns of the batch, results and scratch memory."""

    def __init__(self, batch: PRMBatch, config: ScanConfig, rows: int) -> None:
        total, responses, device = batch.log_ratio.numel(), batch.outcomes.numel(), batch.log_ratio.device
        self.log_ratio = column(batch.log_ratio, torch.float32, total, device)
        self.outcomes = column(batch.outcomes, torch.float64, responses, device)
        self.cu_seqlens, _ = offsets(batch.cu_seqlens, device)
        # Unused arguments repeat an existing tensor; the kernels do not read them.
        grouped = batch.cu_groups is not None
        self.cu_groups, self.groups = (self.cu_seqlens, 0)
        if batch.cu_groups is not None:
            self.cu_groups, self.groups = offsets(batch.cu_groups, device)
        self.weights, self.shift = (column(each, torch.float64, responses, device) for each in batch[4:])
        self.loss, self.accuracy = self.log_ratio.new_empty(()), self.log_ratio.new_empty(())
        self.scratch = self.outcomes.new_empty(RESPONSE_COLUMNS, responses)
        self.published = self.outcomes.new_empty(rows, config.slots)
        self.tiles = config.tiles
        self.constants = {
            "GROUPED": grouped,
            "WEIGHTED": self.weights is not None,
            "SHIFTED": self.shift is not None,
            "RESPONSES": RESPONSES,
        }

    def arguments(self, slope: Tensor, beta: float) -> tuple[Tensor | float, ...]:
        return (
            self.log_ratio,
            self.outcomes,
            self.cu_seqlens,
            self.cu_groups,
            self.outcomes if self.weights is None else self.weights,
            self.outcomes if self.shift is None else self.shift,
            self.loss,
            self.accuracy,
            slope,
            self.scratch,
            self.published,
            arrivals(slope.device),
            self.log_ratio.numel(),
            self.outcomes.numel(),
            self.groups,
            self.tiles,
            beta,
        )


def _checked(tokens: PPOTokens) -> PPOTokens:
    total, device = tokens.logp.numel(), tokens.logp.device
    logp, old_logp, advantages = (column(each, torch.float32, total, device) for each in tokens[:3])
    weights = column(tokens.weights, torch.float32, total, device)
    return PPOTokens(logp, old_logp, advantages, weights, mask_column(tokens.mask, total, device))
