"""A row of prompts and responses through transformers' attention interface, layer by layer.

A model takes its mask where it takes a 4D one, which it hands to its layers as it is: a tensor of one element, expanded
to the mask's shape, that bears the row. For the pass the configuration names our function in place of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..protocols import CausalLM
from . import blockwise, flex
from .segments import Segments

NAME = "prime_segments"
Kernel = Literal["blocks", "flex"]
"""`blocks`: block by block in plain PyTorch; `flex`: torch's FlexAttention, which has no backward pass on CPUs."""
_KERNELS = {"blocks": blockwise.attention, "flex": flex.attention}


class UnsupportedLayer(ValueError):
    """A layer asks for what rows have no form of; the message names its argument, what was expected and what came."""

    def __init__(self, layer: nn.Module, argument: str, expected: str, got: object) -> None:
        said = f"{str(got.dtype).removeprefix('torch.')} {[*got.shape]}" if isinstance(got, Tensor) else repr(got)
        super().__init__(f"{type(layer).__name__}'s {argument}: expected {expected}, got {said}")


class _Row(NamedTuple):
    segments: Segments
    window: int | None
    kernel: Kernel


def kernels(device: torch.device) -> tuple[Kernel, ...]:
    """The fastest first."""
    return ("flex", "blocks") if device.type == "cuda" else ("blocks",)


def mask(segments: Segments, window: int | None, kernel: Kernel, device: torch.device) -> Tensor:
    """What a model takes as its mask: bool [1, 1, L, L] of one element in memory."""
    made = torch.zeros((), dtype=torch.bool, device=device).expand(1, 1, segments.length, segments.length)
    made.row = _Row(segments, window, kernel)  # type: ignore[attr-defined]
    return made


@contextmanager
def implementation(model: CausalLM, name: str) -> Iterator[None]:
    """`model` with the attention `name`."""
    _register()
    own = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = own


def as_it_was(model: CausalLM) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """`context_fn` of activation checkpointing: layers are recomputed with the attention of their forward pass."""
    return lambda: (nullcontext(), implementation(model, model.config._attn_implementation))


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)


@torch.compiler.disable
def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Of queries [1, heads, L, e]; returns [1, L, heads, d].

    Raises UnsupportedLayer for what blocks of a row have no form of. Loading a model proves its layers through here
    (`models.traits`): one that asks for such things gets one response a row, with the text as the reason.
    """
    row: _Row | None = getattr(attention_mask, "row", None)
    if row is None:
        raise UnsupportedLayer(module, "attention_mask", "the row as the model was given it", attention_mask)
    if dropout:
        raise UnsupportedLayer(module, "dropout", "0", dropout)
    if position_bias is not None:
        raise UnsupportedLayer(module, "position_bias", "None", position_bias)
    if is_causal is False:
        raise UnsupportedLayer(module, "is_causal", "True", is_causal)
    length = row.segments.length
    for name, each in (("query", query), ("key", key)):
        if len(each) != 1 or each.shape[2] != length:
            raise UnsupportedLayer(module, name, f"the {length} tokens of one row", each)
    settings = blockwise.Settings(
        row.segments, row.window, query.shape[3] ** -0.5 if scaling is None else scaling, softcap
    )
    return _KERNELS[row.kernel](query, key, value, s_aux, settings).transpose(1, 2), None
