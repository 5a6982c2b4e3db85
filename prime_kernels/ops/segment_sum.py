"""Sum over each segment of packed values: S_k = sum_{offsets_k <= t < offsets_{k+1}} x_t."""

from typing import Any

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._segment_math import result_dtype, segment_total


def reference(values: Tensor, cu_segments: Tensor) -> Tensor:
    """Accumulated in float64."""
    return segment_total(values, cu_segments).to(result_dtype(values))


class SegmentSum(torch.autograd.Function):
    """The sum of each segment of float32 values [T] on a backend, [S] float64."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.total, ctx.backend = values.numel(), backend
        return _backends.packed(backend).sum_segments(values, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return SegmentFill.apply(grad, offsets, ctx.total, ctx.backend), None, None


class SegmentFill(torch.autograd.Function):
    """The gradient of a segment sum: each token gets its segment's value of [S] float64, [T] float32."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, total: int, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.backend = backend
        return _backends.packed(backend).fill_segments(values, offsets, total)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        return SegmentSum.apply(grad, offsets, ctx.backend), None, None, None


def segment_sum(values: Tensor, cu_segments: Tensor, *, backend: str | None = None) -> Tensor:
    """Sum of packed values over each segment; an empty segment sums to 0. Differentiable in ``values``.

    Args:
        values: [T], floating point.
        cu_segments: [S + 1], int32 or int64: where segments start, from 0, non-decreasing, ending at T.
        backend: see :mod:`prime_kernels`.

    Returns:
        [S], float32 (float64 for float64 values). Sums are accumulated in float64.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, or offsets that do not start at 0, rise and end at T.
        BackendUnavailable: the backend asked for cannot run this.

    Source: the response sums of the implicit reward, arXiv 2412.01981.
    """
    _checks.floating("values", values, ndim=1)
    cu_segments = _checks.offsets("cu_segments", cu_segments, values.numel(), "tokens", values, "values")
    chosen = _dispatch.resolve("segment_sum", values, backend)
    if chosen == "eager":
        return reference(values, cu_segments)
    return SegmentSum.apply(values.float(), cu_segments, chosen).float()
