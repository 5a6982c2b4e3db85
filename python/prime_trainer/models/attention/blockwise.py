"""Attention of a row without a mask of all pairs, with its gradients: memory grows with the tokens.

In tiles of plain matrix products (`tiles`) in bfloat16 where a CPU multiplies it in hardware, which PyTorch's flash
kernel makes no use of (bench/results/attention), and with a cap on the scores, with values of another size than keys or
on another device than a CPU; else in that kernel, block by block.

Each block (`segments.Block`) gives outputs and log-sum-exps of its own; those of a query's blocks are combined as in
flash attention. The backward pass of a block needs only the outputs and log-sum-exps of the whole row, by which its
probabilities are those among all keys that a query sees.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tiles
from .segments import Block
from .tiles import Settings

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: Settings) -> Tensor:
    """[1, heads, L, d] of queries [1, heads, L, e], keys [1, key heads, L, e] and values [1, key heads, L, d].

    `sinks` [heads] are scores beside those of the keys that a query sees, whose probability goes nowhere.
    """
    flash = query.device.type == "cpu" and settings.softcap is None and query.shape[3] == value.shape[3]
    if not flash or (query.dtype == torch.bfloat16 and _multiplies_bfloat16()):
        return tiles.attention(query, key, value, sinks, settings)
    out: Tensor = _Attention.apply(query, key, value, sinks, settings)
    return out


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether tiles are known to be faster: not measured with AMX, of which the flash kernel makes use."""
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_bf16")) and not has.get("amx_tile") and torch.backends.mkldnn.is_available()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: Settings
    ) -> Tensor:
        length, heads = query.shape[2], query.shape[1]
        # In the order in which the output layer reads it.
        out = query.new_empty(1, length, heads, value.shape[3]).transpose(1, 2)
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        lse = torch.empty(1, heads, length, dtype=wide, device=query.device)
        run = _Flash(settings)
        for block in settings.segments.blocks(settings.window):
            part, its_lse = run(query[:, :, block.queries], key[:, :, block.keys], value[:, :, block.keys], block)
            mine, whole = out[:, :, block.queries], lse[:, :, block.queries]
            if block.first:
                mine.copy_(part)
                whole.copy_(its_lse)
            else:
                both = torch.logaddexp(whole, its_lse)
                shares = ((each - both).exp().unsqueeze(3) for each in (whole, its_lse))
                mine.copy_(mine * next(shares) + part * next(shares))
                whole.copy_(both)
        if sinks is not None:
            both = torch.logaddexp(lse, sinks.to(wide)[None, :, None])
            out.mul_((lse - both).exp().unsqueeze(3))
            lse = both
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, lse = ctx.saved_tensors
        found = [torch.zeros(each.shape, dtype=lse.dtype, device=each.device) for each in (query, key, value)]
        run = _Flash(ctx.settings)
        for block in ctx.settings.segments.blocks(ctx.settings.window):
            of_queries = (each[:, :, block.queries] for each in (grad, out, lse))
            parts = run.backward(
                _Upstream(*of_queries), query[:, :, block.queries], key[:, :, block.keys], value[:, :, block.keys],
                block,
            )  # fmt: skip
            for whole, part, at in zip(found, parts, (block.queries, block.keys, block.keys), strict=True):
                whole[:, :, at] += part
        of_sinks = None
        if sinks is not None:
            kept = (grad * out).sum(3, dtype=lse.dtype)
            of_sinks = -(kept * (sinks.to(lse.dtype)[None, :, None] - lse).exp()).sum((0, 2)).to(sinks.dtype)
        return *(each.to(query.dtype) for each in found), of_sinks, None


class _Upstream(NamedTuple):
    """Of the queries of a block: the gradient of their outputs, and outputs and log-sum-exps over all their blocks."""

    grad: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class _Flash:
    settings: Settings

    def _mask(self, block: Block, like: Tensor) -> Tensor | None:
        if block.kind != "band":
            return None
        seen = block.seen(self.settings.window, like.device)
        return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        out, lse = _flash(
            query, key, value, 0.0, block.kind == "causal",
            attn_mask=self._mask(block, query), scale=self.settings.scale,
        )  # fmt: skip
        return out, lse

    def backward(
        self, upstream: _Upstream, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = _flash_backward(
            upstream.grad, query, key, value, upstream.out, upstream.lse, 0.0, block.kind == "causal",
            attn_mask=self._mask(block, query), scale=self.settings.scale,
        )  # fmt: skip
        return found
