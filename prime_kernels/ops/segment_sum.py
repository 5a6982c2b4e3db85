"""Sum over each segment of packed values: S_k = sum_{offsets_k <= t < offsets_{k+1}} x_t."""

from torch import Tensor

from prime_kernels import _checks, _dispatch
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops._segments import segment_total_on


def reference(values: Tensor, cu_segments: Tensor, backend: str = "eager") -> Tensor:
    """Accumulated in float64."""
    return segment_total_on(backend, values, cu_segments).to(result_dtype(values))


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
