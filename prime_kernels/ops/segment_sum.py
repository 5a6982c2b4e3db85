"""Sum over each segment of packed values: S_k = sum_{offsets_k <= t < offsets_{k+1}} x_t."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._segment_math import result_dtype, segment_index, segment_total


def reference(values: Tensor, cu_segments: Tensor, backend: str = "eager") -> Tensor:
    """Accumulated in float64."""
    return segment_total_on(backend, values, cu_segments).to(result_dtype(values))


def segment_total_on(backend: str, values: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each segment of checked offsets [S + 1], [S] float64, on a resolved backend; differentiable."""
    if backend == "eager":
        return segment_total(values, segment_index(offsets, values.numel()), offsets.numel() - 1)
    return _Total.apply(values.float(), offsets, backend)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, offsets: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.total, ctx.backend = values.numel(), backend
        return _backends.packed(backend).segment_sum(values, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _backends.packed(ctx.backend).segment_fill(grad, offsets, ctx.total), None, None


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
    return reference(values, cu_segments, _dispatch.resolve("segment_sum", values, backend))
