"""Sums over segments on any backend."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prime_kernels import _dispatch
from prime_kernels._segment_math import segment_index, segment_total


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
        return _dispatch.token_passes(backend).segment_sum(values, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (offsets,) = ctx.saved_tensors
        return _dispatch.token_passes(ctx.backend).segment_fill(grad, offsets, ctx.total), None, None
