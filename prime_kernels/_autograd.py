"""Backward passes of kernels that give first derivatives only."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]
Backward = Callable[..., Gradients]


def first_derivative_only(operation: str) -> Callable[[Backward], Backward]:
    """Decorator of a ``backward`` whose gradients raise RuntimeError if they are differentiated.

    torch's ``once_differentiable`` raises only if the incoming gradient requires grad itself. Otherwise the result
    counts as a constant, and a second derivative beside another loss is silently 0.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def checked(ctx: Any, *grads: Tensor | None) -> Gradients:
            with torch.no_grad():
                found = backward(ctx, *grads)
            if not torch.is_grad_enabled():
                return found
            # create_graph=True: these gradients may be differentiated.
            return tuple(None if each is None else _FirstDerivative.apply(_leaf(each), operation) for each in found)

        return checked

    return decorate


def _leaf(gradient: Tensor) -> Tensor:
    return gradient.detach().requires_grad_()


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient: Tensor, operation: str) -> Tensor:
        ctx.operation = operation
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        raise RuntimeError(
            f"{ctx.operation}: expected a first derivative, got a second one (create_graph=True), which the kernels "
            "do not have; pass backend='eager' without inplace_backward"
        )
