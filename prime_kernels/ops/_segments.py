"""What the segment operations share."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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


def segment_total_on(backend: str, values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment of checked offsets [S + 1], [S] float64, on a resolved backend; differentiable."""
    if backend == "eager":
        return segment_total(values, segment_index(offsets, values.numel()), offsets.numel() - 1)
    return _NativeTotal.apply(values.float(), offsets)


class _NativeTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor) -> Tensor:
        from prime_kernels import _native

        ctx.save_for_backward(offsets)
        ctx.total = values.numel()
        return _native.segment_sum(values, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from prime_kernels import _native

        (offsets,) = ctx.saved_tensors
        return _native.segment_fill(grad, offsets, ctx.total), None
