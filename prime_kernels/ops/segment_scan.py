"""Discounted running sums within segments.

Forward:  y_t = x_t + gamma * y_{t-1}, reverse: y_t = x_t + gamma * y_{t+1}, each starting afresh in every segment.
The gradient of a scan is the scan of the gradient in the other direction.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._segment_math import result_dtype, segment_index


def reference(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """The scan by doubling, in float64.

    After the step with shift k, y_t is the discounted sum of the nearest 2k elements of its segment, so log2(longest)
    steps suffice. Nothing is divided by powers of gamma: tiny gammas and long segments stay exact.
    """
    total = values.numel()
    index = segment_index(cu_seqlens, total)
    place = torch.arange(total, device=values.device)
    # How many elements of its segment come before each element, in scan direction.
    before = cu_seqlens[1:][index] - 1 - place if reverse else place - cu_seqlens[:-1][index]
    # Reading the longest segment would wait for a GPU; a few idle doublings are cheaper.
    longest = total if values.is_cuda or total == 0 else int(cu_seqlens.diff().max())
    scanned, shift = values.double(), 1
    # A tensor, as torch.compile would guard on every power of a number that changes from call to call.
    discount = torch.full((), gamma, dtype=torch.float64, device=values.device)
    while shift < longest and gamma != 0.0:
        gap = scanned.new_zeros(shift)
        nearer = torch.cat((scanned[shift:], gap)) if reverse else torch.cat((gap, scanned[:-shift]))
        # What a power too small to be written would count for is nothing, infinity included.
        scanned = scanned + discount * nearer.where((before >= shift) & (discount != 0.0), 0.0)
        shift, discount = 2 * shift, discount * discount
    return scanned.to(result_dtype(values))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool, backend: str) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.gamma, ctx.reverse, ctx.backend = gamma, reverse, backend
        return _backends.packed(backend).segment_scan(values, cu_seqlens, gamma, reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        passes = _backends.packed(ctx.backend)
        return passes.segment_scan(grad, cu_seqlens, ctx.gamma, not ctx.reverse), None, None, None, None


def scan_on(backend: str, values: Tensor, offsets: Tensor, gamma: float, reverse: bool) -> Tensor:
    """The scan of float32 or float64 values over checked offsets, in their dtype, on a resolved backend."""
    # Without a discount there is nothing for a kernel to do, and 0 * inf would be NaN in one that multiplies.
    if backend == "eager" or gamma == 0.0:
        return reference(values, offsets, gamma, reverse)
    return _Scan.apply(values, offsets, gamma, reverse, backend)


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
    return scan_on(chosen, values.to(result_dtype(values)), cu_seqlens, gamma, reverse)
