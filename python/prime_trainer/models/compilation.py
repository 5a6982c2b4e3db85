"""Compiled decoder layers: each layer by itself, one graph for all layers of a kind and for passes of any length."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch

from ..scale import sharding
from .model_files import ModelError
from .protocols import CausalLM


def compile_layers(model: CausalLM, backend: str = "inductor") -> CausalLM:
    """Compiles the layers' passes in place; passes with a cache, in which sampling reads and writes, stay as they are.

    Raises ModelError where there is nothing that compiles for the model's device.
    """
    if backend == "inductor" and model.device.type == "cpu" and _compiler() is None:
        raise ModelError("model.compile = true needs a C++ compiler on a CPU (g++ or clang++, or CXX): found none")
    for layer in sharding.layers(model):
        layer.forward = _without_cache(layer.forward, torch.compile(layer.forward, dynamic=True, backend=backend))
    return model


def _without_cache(own: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        cached = kwargs.get("past_key_values") is not None or kwargs.get("use_cache")
        return (own if cached else compiled)(*args, **kwargs)

    return forward


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "clang++"))), None)
