"""Discounted running sums within segments.

Forward: y_t = x_t + gamma * y_{t-1}; reverse: y_t = x_t + gamma * y_{t+1}. Segments are independent.
The gradient of a scan is the scan of the gradient in the other direction.
"""

from typing import Any

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._segment_math import result_dtype, segment_index


def reference(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """The scan by doubling, in float64.

    After the step with shift k, y_t is the discounted sum of the nearest 2k elements of its segment, so log2(longest
    segment) steps suffice. Nothing is divided by a power of gamma: small gammas and long segments stay exact.
    """
    total = values.numel()
    index = segment_index(cu_seqlens, total)
    place = torch.arange(total, dtype=torch.int64, device=values.device)
    # Elements of the same segment before each element, in scan direction.
    before = cu_seqlens[1:][index] - 1 - place if reverse else place - cu_seqlens[:-1][index]
    # Reading the longest segment would wait for a GPU; a few idle doublings are cheaper.
    longest = total if values.is_cuda or total == 0 else int(cu_seqlens.diff().max())
    scanned, shift = values.double(), 1
    # A tensor: torch.compile would guard on every power of a Python number.
    discount = torch.full((), gamma, dtype=torch.float64, device=values.device)
    while shift < longest and gamma != 0.0:
        gap = scanned.new_zeros(shift)
        nearer = torch.cat((scanned[shift:], gap)) if reverse else torch.cat((gap, scanned[:-shift]))
        # A power that underflows to 0 drops its element, even an infinite one.
        scanned = scanned + discount * nearer.where((before >= shift) & (discount != 0.0), 0.0)
        shift, discount = 2 * shift, discount * discount
    return scanned.to(result_dtype(values))


class SegmentScan(torch.autograd.Function):
    """The scan of float32 or float64 values on a backend, in their dtype. For gamma above 0: 0 * inf would be NaN."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool, backend: str) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.gamma, ctx.reverse, ctx.backend = gamma, reverse, backend
        return _backends.packed(backend).scan_segments(values, cu_seqlens, gamma, reverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (cu_seqlens,) = ctx.saved_tensors
        scanned = SegmentScan.apply(grad, cu_seqlens, ctx.gamma, not ctx.reverse, ctx.backend)
        return scanned, None, None, None, None


def segment_scan(
    values: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, reverse: bool = False, backend: str | None = None
) -> Tensor:
    """Discounted running sum within each segment of packed values. Differentiable in ``values``, deterministic.

    y_t = x_t + gamma * y_{t-1}, or with ``reverse`` y_t = x_t + gamma * y_{t+1}; segments do not see each other.

    Args:
        values: [T], floating point.
        cu_seqlens: [B + 1], int32 or int64: where segments start, from 0, non-decreasing, ending at T.
        gamma: the discount, in [0, 1]; 0 returns the values.
        reverse: scan from the end of each segment: with rewards as values this gives returns.
        backend: see :mod:`prime_kernels`.

    Returns:
        [T], float32 (float64 for float64 values).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, offsets that do not start at 0, rise and end at T, gamma outside [0, 1].
        BackendUnavailable: the backend asked for cannot run this.

    Source: the returns of PRIME, arXiv 2502.01456, section 3.
    """
    _checks.floating("values", values, ndim=1)
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, values.numel(), "tokens", values, "values")
    gamma = _checks.number("gamma", gamma, 0.0, 1.0)
    _checks.flag("reverse", reverse)
    chosen = _dispatch.resolve("segment_scan", values, backend)
    values = values.to(result_dtype(values))
    if chosen == "eager" or gamma == 0.0:
        return reference(values, cu_seqlens, gamma, reverse)
    return SegmentScan.apply(values, cu_seqlens, gamma, reverse, chosen)
