"""Sizes of a model and what its passes take, counted on the model without data (meta device)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prime_kernels.integrations import tile_sizes

from ..models import forward
from ..models.adapters.views import adapted
from ..models.protocols import CausalLM
from ..scale import sharding


@dataclass(frozen=True)
class Trained:
    """Of a model's parameters, in elements, those that one role trains: all, or those of its adapter."""

    parameters: int
    layer: int
    """In the layer that has most."""
    outside: int
    """In the body outside the layers."""
    head: int
    head_adapter: int
    """In the adapter on the head, whose gradient is made as that of a wider head."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model in elements, adapters included; a `layer` is the largest one."""

    parameters: int
    layer: int
    outside: int
    """Parameters of the body outside the layers, the embedding among them."""
    head: int
    tied: bool
    layers: int
    width: int
    vocabulary: int
    cache_per_token: int
    """Keys and values of all layers."""
    head_columns: int
    """That adapters add to the head in each pass."""

    @property
    def wide_head(self) -> Shape:
        """With the head that passes go through as the head, and its width as the width."""
        width = self.width + self.head_columns
        return replace(self, width=width, head=self.vocabulary * width) if self.head_columns else self


@dataclass(frozen=True)
class Passes:
    """Bytes that passes of the body take beside its parameters."""

    tokens: int
    """Of one pass."""
    forward: int
    """At most, in a pass without gradients."""
    kept: int
    """After the forward of a pass with gradients."""
    backward: int
    """At most, in a pass with gradients; each parameter's gradient goes as it comes."""


def shape_of(model: CausalLM, head_columns: int = 0) -> Shape:
    """Counts a model's parameters; those that modules share count once. `head_columns`: see `Shape`."""
    found = sharding.layers(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in found]
    total, body = (sum(p.numel() for p in module.parameters()) for module in (model, model.base_model))
    head, config = model.get_output_embeddings().weight, model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        total, max(sizes), body - sum(sizes), head.numel(), head is model.get_input_embeddings().weight, len(found),
        config.hidden_size, len(head),
        2 * len(found) * size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
        head_columns,
    )  # fmt: skip


def trained_of(model: CausalLM) -> Trained:
    """Of the parameters of `model` that take gradients, where they are."""
    mine = {id(p): p.numel() for p in model.parameters() if p.requires_grad}

    def count(parameters: Iterable[Tensor]) -> int:
        return sum(mine.get(id(p), 0) for p in parameters)

    layers = [count(layer.parameters()) for layer in sharding.layers(model)]
    head, view = model.get_output_embeddings().weight, adapted(model)
    factors = None if view is None else view.factors().get(view.base.head or "")
    return Trained(
        sum(mine.values()), max(layers), count(model.base_model.parameters()) - sum(layers), count([head]),
        0 if factors is None else count([factors.a, factors.b]),
    )  # fmt: skip


class _Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are still alive, and the most there have been."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.most = max(self.most, self.bytes)
        return made

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.bytes += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def passes_of(model: CausalLM, tokens: int) -> Passes:
    """What passes of `tokens` tokens take, from two of them on `meta`. The model is not to be used afterwards."""
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(_drop)
    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    with _Live([ids, *model.parameters(), *model.buffers()]) as live:
        with torch.no_grad():
            forward.hidden_states(model, ids, ids, None)
        peak = live.most
        loss = forward.hidden_states(model, ids, ids, None).mul(1.0).sum()
        live.most = kept = live.bytes
        loss.backward()
    return Passes(tokens, peak, kept, live.most)


def _drop(param: Tensor) -> None:
    param.grad = None


@dataclass(frozen=True)
class Sizes:
    """Bytes of an element, and where it is."""

    compute: int
    """Of hidden states and weights."""
    logit: int
    """4 for the float32 sums of the head's product, `compute` for rounded ones."""
    device: str
    """`cpu` or `cuda`: tiles of logits have another size on each."""


def head_bytes(shape: Shape, tokens: int, of: Sizes, fused: bool, frozen: bool = False) -> dict[str, float]:
    """What the loss of `tokens` response tokens takes while it makes the gradients of hidden states and head; of the
    hidden states alone where the head is `frozen`."""
    compute, logit, device = of.compute, of.logit, of.device
    of_head = 0 if frozen else compute * shape.head
    hidden, sizes = compute * tokens * shape.width, tile_sizes(device)
    if sizes.whole_head:  # which keeps float32 logits, rounded or not
        needed = 4 * tokens * shape.vocabulary
        logits = needed * (needed <= sizes.kept_bytes)
        return {"logits": float(logits), "hidden states, head": float(2 * hidden + of_head)}
    if fused:
        rows, columns = sizes.fused_tokens(logit, tokens, shape.vocabulary), shape.vocabulary
    else:
        rows, columns = sizes.backward_tile(compute, logit, tokens, shape.vocabulary)
    everything = logit * tokens * shape.vocabulary
    kept = 0 if fused or everything > sizes.kept_bytes else everything
    made = kept or logit * rows * columns
    of_hidden = hidden if columns == shape.vocabulary else 4 * tokens * shape.width
    once, low = rows >= tokens, compute < 4
    # One product is written where it stays. A sum over tiles is float32; CPUs add to it through float32 copies of what
    # they add, a block of rows at a time.
    block = low * min(sizes.added_rows, max(rows, columns)) * shape.width * (compute + 4 * (device == "cpu"))
    total = 0 if once else 4 * columns * shape.width + block
    if frozen:  # the block is that of the hidden states' sum
        total = 0 if columns == shape.vocabulary else block
    held = 0 if fused and not once else of_head
    # The gradient of 16-bit inputs' float32 logits is rounded beside them; CPUs multiply float32 copies of such inputs.
    wide = logit > compute
    moments = [(made + wide * compute * rows * columns, held + total)]
    if wide and device == "cpu":
        copies = 4 * (rows + columns) * shape.width
        moments.append((made, held + (0 if once else total - block) + copies))
    if low and columns < shape.vocabulary:  # the sum of the hidden states' gradient is rounded at the end
        moments.append((kept, held + hidden))
    if fused and not once and not frozen:  # the sum is rounded when the logits are gone
        moments.append((0, (4 + compute * low) * shape.head))
    if fused and not frozen:  # gradients times that of the loss
        moments.append((0, 2 * compute * shape.head + hidden))
    logits, others = max(moments, key=sum)
    return {"logits": float(logits), "hidden states, head": float(hidden + of_hidden + others)}


def score_tile_bytes(shape: Shape, tokens: int, of: Sizes) -> float:
    """The logits that are alive while log-probs are made without gradients."""
    sizes = tile_sizes(of.device)
    if sizes.whole_head:
        return 0.0
    rows, columns = sizes.forward_tile(tokens, shape.vocabulary)
    return float(of.logit * rows * columns)


def drawing_bytes(shape: Shape, of: Sizes) -> int:
    """What drawing one token takes: logits, float32 copies of rounded ones, probabilities, and those in whole blocks of
    256.

    CPUs copy what they sum in float64; GPUs read it as it is.
    """
    cast, padded, copied = 4 * (of.logit < 4), 4 * (shape.vocabulary % 256 > 0), 8 * (of.device == "cpu")
    return shape.vocabulary * (of.logit + cast + 4 + padded + copied)
