"""Attention of a row block by block, with its gradients: memory grows with the tokens, not with pairs of them.

Each block (`segments.Block`) gives outputs and log-sum-exps of its own; those of a query's blocks are combined as in
flash attention. The backward pass of a block needs only the outputs and log-sum-exps of the whole row, by which its
probabilities are those among all keys that a query sees. Blocks run in PyTorch's flash kernel for CPUs, or in tiles of
plain matrix products: with a cap on the scores, with values of another size than keys, or on another device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .segments import Block, Segments

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
TILE_BYTES = 2**25
"""Of the scores that a tile has at once."""


@dataclass(frozen=True)
class Settings:
    """How a layer attends to a row."""

    segments: Segments
    window: int | None
    scale: float
    softcap: float | None


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: Settings) -> Tensor:
    """[1, heads, L, d] of queries [1, heads, L, e], keys [1, key heads, L, e] and values [1, key heads, L, d].

    `sinks` [heads] are scores beside those of the keys that a query sees, whose probability goes nowhere.
    """
    out: Tensor = _Attention.apply(query, key, value, sinks, settings)
    return out


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
        for block in settings.segments.blocks(settings.window):
            run = _kernel(query, value, settings)
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
        run = _kernel(query, value, ctx.settings)
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


def _kernel(query: Tensor, value: Tensor, settings: Settings) -> _Flash | _Tiles:
    if query.device.type != "cpu" or settings.softcap is not None or query.shape[3] != value.shape[3]:
        return _Tiles(settings)
    return _Flash(settings)


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


@dataclass(frozen=True)
class _Tiles:
    settings: Settings

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        pieces = []
        for tile, seen in self._tiles(query, key, block):
            scores = self._scores(query[:, :, tile], key, seen)
            lse = scores.logsumexp(2)
            shares = scores.sub_(lse.unsqueeze(2)).exp_().to(value.dtype)
            out = shares @ value[0, :, : shares.shape[2]]
            pieces.append((_ungrouped(out, query), _ungrouped(lse.unsqueeze(2), query).squeeze(3)))
        outs, lses = zip(*pieces, strict=True)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    def backward(
        self, upstream: _Upstream, query: Tensor, key: Tensor, value: Tensor, block: Block
    ) -> tuple[Tensor, Tensor, Tensor]:
        of_query = []
        wide = upstream.lse.dtype
        of_key, of_value = (torch.zeros(each.shape, dtype=wide, device=each.device) for each in (key, value))
        for tile, seen in self._tiles(query, key, block):
            mine, grad = query[:, :, tile], _grouped(upstream.grad[:, :, tile], key)
            scores = self._scores(mine, key, seen)
            shares = (scores - _grouped(upstream.lse[:, :, tile].unsqueeze(3), key)).exp_()
            keys, values = (each[0, :, : seen.stop] for each in (key, value))
            of_value[0, :, : seen.stop] += shares.to(value.dtype).transpose(1, 2) @ grad
            kept = (grad * _grouped(upstream.out[:, :, tile], key)).sum(2, keepdim=True, dtype=wide)
            of_scores = (grad @ values.transpose(1, 2)).to(wide).sub_(kept).mul_(shares)
            if self.settings.softcap is not None:
                of_scores *= 1 - (scores.clamp_min(-self.settings.softcap) / self.settings.softcap).square_()
            of_scores = of_scores.mul_(self.settings.scale).to(query.dtype)
            of_query.append(_ungrouped(of_scores @ keys, query))
            of_key[0, :, : seen.stop] += of_scores.transpose(1, 2) @ _grouped(mine, key)
        return torch.cat(of_query, 2), of_key, of_value

    def _tiles(self, query: Tensor, key: Tensor, block: Block) -> Iterator[tuple[slice, _Seen]]:
        """Queries of the block a tile at a time, with what they see of its keys."""
        length, n_keys = query.shape[2], key.shape[2]
        step = max(1, TILE_BYTES // (4 * query.shape[1] * n_keys))
        for begin in range(0, length, step):
            end = min(length, begin + step)
            stop = n_keys if block.kind == "full" else min(n_keys, block.gap + end)
            part = block._replace(queries=slice(begin, end), keys=slice(0, stop), gap=block.gap + begin)
            mask = None if block.kind == "full" else part.seen(self.settings.window, query.device)
            yield slice(begin, end), _Seen(stop, mask)

    def _scores(self, query: Tensor, key: Tensor, seen: _Seen) -> Tensor:
        """[key heads, heads of each x queries, keys]."""
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        scores = (_grouped(query, key) @ key[0, :, : seen.stop].transpose(1, 2)).to(wide).mul_(self.settings.scale)
        if self.settings.softcap is not None:
            scores = scores.div_(self.settings.softcap).tanh_().mul_(self.settings.softcap)
        if seen.mask is not None:
            scores.view(len(scores), -1, *seen.mask.shape).masked_fill_(~seen.mask, -torch.inf)
        return scores


class _Seen(NamedTuple):
    stop: int
    """Keys from here on are not seen."""
    mask: Tensor | None
    """bool [queries, keys before `stop`], None where all are seen."""


def _grouped(queries: Tensor, key: Tensor) -> Tensor:
    """[1, heads, n, x] as [key heads, heads of each x n, x]."""
    return queries.reshape(key.shape[1], -1, queries.shape[3])


def _ungrouped(values: Tensor, query: Tensor) -> Tensor:
    """[key heads, heads of each x n, x] as [1, heads, n, x]."""
    return values.reshape(1, query.shape[1], -1, values.shape[2])
