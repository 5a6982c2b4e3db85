"""Capped logits: cap(z) = c * tanh(z / c) before the temperature, as Gemma 2 and nanochat have them.

The row kernels never see the cap. They take capped logits in float32, and what they give for their gradient is
multiplied by the slope 1 - (cap(z) / c)^2, for a tile of logits while it is in cache. Kernels for whole heads cap by
themselves.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prime_kernels import _checks
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._segment_math import result_dtype


def check_softcap(name: str, softcap: float | None) -> float | None:
    """A finite number above 0, or None."""
    return None if softcap is None else _checks.number(name, softcap, 0.0, math.inf, above_low=True)


class _Capped(torch.autograd.Function):
    """Capped logits alone are kept for the gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, softcap: float) -> Tensor:
        values = cap(logits.to(result_dtype(logits), copy=True), softcap)
        ctx.save_for_backward(values)
        ctx.softcap, ctx.dtype = softcap, logits.dtype
        return values

    @staticmethod
    @first_derivative_only("log_probs and log_ratios with a softcap")
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        (values,) = ctx.saved_tensors
        return through_cap(grad, slope(values, ctx.softcap)).to(ctx.dtype), None


def capped(logits: Tensor, softcap: float | None, mask: Tensor | None, *, plain: bool) -> Tensor:
    """The capped logits [..., V], float32 or float64; rows where ``mask`` is False do not matter.

    ``plain``: as PyTorch's own operations, which a compiler fuses and which have a second derivative.
    """
    if softcap is None:
        return logits
    if plain:
        # What is not looked at must not reach the gradient as NaN.
        logits = logits if mask is None else logits.masked_fill(~mask.unsqueeze(-1), 0.0)
        return softcap * torch.tanh(logits.to(result_dtype(logits)) / softcap)
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return cap(logits.to(result_dtype(logits), copy=True), softcap)
    return _Capped.apply(logits, softcap)


def cap(values: Tensor, softcap: float) -> Tensor:
    """``values`` are overwritten by the capped ones."""
    return values.div_(softcap).tanh_().mul_(softcap)


def slope(values: Tensor, softcap: float) -> Tensor:
    """d cap(z) / d z from capped ``values``."""
    return torch.div(values, softcap).square_().neg_().add_(1.0)


def through_cap(grad: Tensor, slope: Tensor) -> Tensor:
    """The gradient of logits from that of the capped ones. Rows without a gradient may hold anything, NaN included."""
    return torch.where(grad == 0.0, grad, grad * slope)
