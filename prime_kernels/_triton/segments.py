"""Launches of the segment kernels on checked tensors."""

import torch
from torch import Tensor

from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column
from prime_kernels._triton._launch import launch_phases, log2, offsets, on_device, options, scan_config
from prime_kernels._triton._launch_config import ScanConfig
from prime_kernels._triton._segments_kernels import fill_kernel, scan_kernel, sum_kernel


def scan_segments(
    values: Tensor,
    cu_seqlens: Tensor,
    gamma: float,
    reverse: bool,
    factor: Tensor | None = None,
    config: ScanConfig | None = None,
) -> Tensor:
    """[T] in the dtype of ``values``, float32 or float64: y = x + gamma * y_before in each segment, in one launch.

    The results are multiplied by ``factor``, a float32 scalar.
    """
    total, device = values.numel(), values.device
    assert values.dtype in (torch.float32, torch.float64)
    values, (cu_seqlens, segments) = column(values, values.dtype, total, device), offsets(cu_seqlens, device)
    out = torch.empty_like(values)
    if total == 0:
        return out
    config = config or scan_config(total, device)
    published = values.new_empty(2, config.slots, dtype=torch.float64)
    with on_device(device):
        sizes = (total, segments, config.tiles, gamma, log2(gamma))
        by = values if factor is None else column(factor, torch.float32, 1, device)
        arguments = (values, cu_seqlens, by, out, published, arrivals(device), *sizes)
        launch_phases(scan_kernel, config, arguments, 0, 1, REVERSE=reverse, SCALED=factor is not None)
    return out


def sum_segments(values: Tensor, cu_segments: Tensor, config: ScanConfig | None = None) -> Tensor:
    """[S] float64: the sum of each segment of [T] float32, 0 where it is empty, in one launch."""
    total, device = values.numel(), values.device
    values, (cu_segments, segments) = column(values, torch.float32, total, device), offsets(cu_segments, device)
    if total == 0:
        return values.new_zeros(segments, dtype=torch.float64)
    sums = values.new_empty(segments, dtype=torch.float64)
    config = config or scan_config(total, device)
    published = values.new_empty(2, config.slots, dtype=torch.float64)
    with on_device(device):
        sum_kernel[(config.programs,)](
            values,
            cu_segments,
            sums,
            published,
            arrivals(device),
            total,
            segments,
            config.tiles,
            **options(config),
        )
    return sums


def fill_segments(
    values: Tensor, cu_segments: Tensor, total: int, factor: Tensor | None = None, config: ScanConfig | None = None
) -> Tensor:
    """[total] float32: each token its segment's value of [S] float64 times ``factor``, a scalar, in one launch."""
    device = values.device
    assert factor is None or (factor.numel() == 1 and factor.device == device)
    cu_segments, segments = offsets(cu_segments, device)
    values = column(values, torch.float64, segments, device)
    out = values.new_empty(total, dtype=torch.float32)
    if total == 0:
        return out
    config = config or scan_config(total, device)
    with on_device(device):
        fill_kernel[(-(-total // config.block),)](
            values,
            cu_segments,
            values if factor is None else factor,
            out,
            total,
            segments,
            SCALED=factor is not None,
            BLOCK=config.block,
            num_warps=config.num_warps,
        )
    return out
