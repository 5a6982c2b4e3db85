"""What the segment operations share."""

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
