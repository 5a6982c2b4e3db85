"""Packed tokens in plain PyTorch: what references and kernels share that is no operation of its own."""

import torch
from torch import Tensor


def segment_index(offsets: Tensor, total: int) -> Tensor:
    """The segment of each element, [total] int64, from checked offsets [S + 1]. Never waits for the device."""
    segments = torch.arange(offsets.numel() - 1, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=total)


def segment_total(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """Sum of each segment, [segments] float64: long sums keep every digit of their float32 terms."""
    total = torch.zeros(segments, dtype=torch.float64, device=values.device)
    return total.index_add(0, index, values.double())


def result_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def leave_one_out(values: Tensor, counted: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each response: (mean of the other counted responses of its group, how many these are), float64.

    The mean is 0 where there are none: a group of one has baseline 0.
    """
    group, groups = segment_index(cu_groups, values.numel()), cu_groups.numel() - 1
    values = values.where(counted, 0.0)
    others = (segment_total(counted, group, groups)[group] - counted.double()).clamp(min=0.0)
    return (segment_total(values, group, groups)[group] - values) / others.clamp(min=1.0), others


def merge_moments(moments: Tensor) -> Tensor:
    """[3] of [P, 3] float64: (count, mean, sum of squares about the mean) of all from those of parts, without the
    cancellation of a sum of squares less a square."""
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    merged = (count * mean).sum() / total.clamp(min=1.0)
    return torch.stack((total, merged, squares.sum() + (count * (mean - merged).square()).sum()))
