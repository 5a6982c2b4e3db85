"""Activation checkpointing: what the backward pass recomputes in place of keeping it (arXiv 1604.06174, 2205.05198)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from .sharding import Shardable, layers

Recomputed = Literal["none", "selective", "full"]
Contexts = Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]
Model = TypeVar("Model", bound=Shardable)


def recompute_activations(model: Model, what: Recomputed, contexts: Contexts = noop_context_fn) -> Model:
    """Changes the layers' passes in place; values and gradients stay what they are.

    `selective` recomputes what is no product and large: normalisations written in several operations, which keep two
    float32 copies of their input, and the activation of a gated MLP and its product with the other branch. `full` keeps
    a layer's input alone, and `contexts` gives the contexts of its forward pass and of its recomputation.
    """
    if what == "full":
        for layer in layers(model):
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False, context_fn=contexts)
    elif what == "selective":
        for module in model.base_model.modules():
            if _is_norm(module):
                module.forward = _recomputed(module.forward)
            elif _is_gated_mlp(module):
                module.forward = _gated(module)
    return model


def _recomputed(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(*inputs: Any, **options: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return own(*inputs, **options)
        # It draws no random numbers: nothing here has dropout.
        found: Tensor = checkpoint(own, *inputs, use_reentrant=False, preserve_rng_state=False, **options)
        return found

    return forward


def _is_norm(module: nn.Module) -> bool:
    """PyTorch's own normalisations are one operation, which keeps its input and the statistics alone."""
    name = type(module).__name__
    return name.endswith("Norm") and not type(module).__module__.startswith("torch.") and not list(module.children())


def _is_gated_mlp(module: nn.Module) -> bool:
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    kind: Any = type(module)
    return all(hasattr(module, name) for name in parts) and _computes_gated(kind)


@functools.cache
def _computes_gated(kind: Any) -> bool:
    """Whether down(act(gate(x)) * up(x)) is all that `kind` computes: asked of its code with functions for weights."""
    parts: dict[str, Any] = {
        "gate_proj": lambda x: 2.0 * x + 1.0,
        "up_proj": lambda x: 3.0 * x - 1.0,
        "down_proj": lambda x: 5.0 * x - 3.0,
        "act_fn": torch.tanh,
    }
    sample = torch.linspace(-1.0, 1.0, 7, dtype=torch.float64).view(1, 7, 1)
    want = parts["down_proj"](parts["act_fn"](parts["gate_proj"](sample)) * parts["up_proj"](sample))
    try:
        got = kind.forward(SimpleNamespace(**parts), sample)
    except Exception:  # it asks for more than these four
        return False
    return isinstance(got, Tensor) and torch.equal(got, want)


def _gated(mlp: Any) -> Callable[[Tensor], Tensor]:
    def of_branches(gate: Tensor, up: Tensor) -> Tensor:
        down: Tensor = mlp.down_proj(mlp.act_fn(gate) * up)
        return down

    own = mlp.forward
    # Recomputation ends with the last tensor that is kept, before the product of `down_proj`: its input, or with an
    # adapter its weight, after the adapter's own two products.
    rest = functools.partial(checkpoint, of_branches, use_reentrant=False, preserve_rng_state=False)

    def forward(x: Tensor) -> Tensor:
        found: Tensor = rest(mlp.gate_proj(x), mlp.up_proj(x)) if torch.is_grad_enabled() else own(x)
        return found

    return forward
