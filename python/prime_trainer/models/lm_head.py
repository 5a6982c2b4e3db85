"""The LM head of a causal LM as the losses take it: its weight, whole on this rank or in shares over all of them.

A share has some of the vocabulary's rows (Megatron-LM, arXiv 1909.08053, section 3). Every rank then needs every rank's
hidden states, and no rank ever holds the head or its gradient whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

import prime_kernels as pk
from prime_kernels import Head
from prime_kernels.integrations import head_logits, output_layer

from ..scale import sharding
from . import traits
from .adapters.views import AdaptedModel, adapted
from .protocols import CausalLM


def is_split(model: CausalLM) -> bool:
    """Whether the head's rows are split over the ranks; passes through the head are then collective."""
    return getattr(model, "head_group", None) is not None


def head(model: CausalLM, hidden: Tensor) -> Head:
    """The whole LM head applied to `hidden` [T, H], as the kernels take it."""
    weight, bias = _parameters(model)
    form, view = traits.of(model).head, _with_adapter(model)
    if view is not None:
        hidden, weight = view.head_hidden(hidden), view.head_weight(weight)
    return Head(
        hidden,
        sharding.whole(weight, hidden.dtype, hidden.device),
        None if bias is None else sharding.whole(bias, hidden.dtype, hidden.device),
        form.scale,
        form.softcap,
    )


def _parameters(model: CausalLM) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias of the head, without what adapters add."""
    layer = model.get_output_embeddings()
    if _with_adapter(model) is None:
        return output_layer(model)
    return layer.base_layer.weight, layer.base_layer.bias


def _with_adapter(model: CausalLM) -> AdaptedModel | None:
    """`model` where its base has an adapter on the head, be it another view's."""
    view = adapted(model)
    return view if view is not None and view.base.head_rank else None


def options(model: CausalLM, temperature: float = 1.0) -> dict[str, Any]:
    """Options of operations that take the head's parameters alone: `temperature` and `softcap`, with the head's factor
    in them, and `logits_dtype`."""
    return traits.of(model).head.options(temperature) | {"logits_dtype": logits_dtype(model)}


def logits_dtype(model: CausalLM) -> Literal["float32", "input"]:
    """`model.logits_dtype` of the configuration it was loaded with, or as `set_logits_dtype` has it."""
    return getattr(model, "logits_dtype", "float32")


def set_logits_dtype(model: CausalLM, found: Literal["float32", "input"]) -> None:
    model.logits_dtype = found  # type: ignore[attr-defined]


@contextmanager
def same_logits(model: CausalLM) -> Iterator[None]:
    """While it lasts, `model(...).logits` are those of the losses: where these are the float32 sums of the product
    (`model.logits_dtype`), the output layer gives them, without gradients, and the model's factor and cap work on them.
    """
    layer, (weight, bias), view = model.get_output_embeddings(), _parameters(model), _with_adapter(model)
    if logits_dtype(model) == "input" or weight.dtype.itemsize >= torch.float32.itemsize:
        yield
        return
    if view is None:
        layer.forward = lambda hidden: head_logits(hidden, weight, bias)
    else:
        wide = view.head_weight(weight).detach()
        layer.forward = lambda hidden: head_logits(view.head_hidden(hidden), wide, bias)
    try:
        yield
    finally:
        del layer.forward


def log_probs(
    model: CausalLM, hidden: Tensor, ids: Tensor, *, temperature: float = 1.0, with_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(log-probs, entropies [T] or None) of `ids` [T], or of [T, K] in one pass where the head is whole; logits never
    exist for more than a tile of tokens."""
    group: dist.ProcessGroup | None = getattr(model, "head_group", None)
    if group is None:
        at = head(model, hidden)
        found = pk.linear_log_probs(
            at.hidden, at.weight, ids, bias=at.bias, with_entropy=with_entropy, **options(model, temperature)
        )
        return (found, None) if isinstance(found, Tensor) else found
    counts = _gathered(torch.tensor([len(ids)], device=ids.device), [1] * dist.get_world_size(group), group).tolist()
    weight, bias = output_layer(model)
    everyones = _OfAllRanks.apply(hidden, counts, group)
    found = pk.linear_log_probs(
        everyones, sharding.share(weight, hidden.dtype, hidden.device), _gathered(ids, counts, group),
        bias=None if bias is None else sharding.share(bias, hidden.dtype, hidden.device),
        with_entropy=with_entropy, process_group=group, **options(model, temperature),
    )  # fmt: skip
    columns = (found,) if isinstance(found, Tensor) else found
    mine = [_OfThisRank.apply(column, counts, group) for column in columns]
    return mine[0], mine[1] if with_entropy else None


def candidates(
    model: CausalLM, hidden: Tensor, ids: Tensor, *, min_prob: float, temperature: float = 1.0
) -> pk.Candidates:
    """Log-probs of `ids` [T], and all tokens of at least `min_prob`, in one pass over a whole head."""
    if is_split(model):
        raise ValueError("candidates need a whole head: scale.vocab_parallel_head must be false")
    return pk.candidates(
        head(model, hidden), ids, min_prob=min_prob, temperature=temperature, logits_dtype=logits_dtype(model)
    )


def _gathered(rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, one rank's after another's; rank r has counts[r]."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _own(counts: list[int], group: dist.ProcessGroup) -> slice:
    first = sum(counts[: dist.get_rank(group)])
    return slice(first, first + counts[dist.get_rank(group)])


class _OfAllRanks(torch.autograd.Function):
    """All ranks' rows; the gradient of them, which every rank has in full, is this rank's part of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.own = _own(counts, group)
        return _gathered(rows, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.own], None, None


class _OfThisRank(torch.autograd.Function):
    """This rank's part of a column that all have; backward puts the parts' gradients together for each share."""

    @staticmethod
    def forward(ctx: Any, column: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return column[_own(counts, group)].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gathered(grad.contiguous(), ctx.counts, ctx.group), None, None
