"""Attention of a row in tiles of plain matrix products, with its gradients: for any dtype, device, size and cap.

A tile has some queries and all keys that they see: those of their prompt and those of their own response, or of several
short responses one after the other. Its scores are softmaxed whole; the backward pass makes them again. A bfloat16
product is as fast as the processor multiplies, and its scores here are as exact as float32 ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .segments import Segments

TILE_BYTES = 2**22
"""Of the scores that a tile has at once: they stay in a cache."""
TILE_QUERIES = 128
"""Of a tile at most: of the keys as many as its queries are not seen by half of these."""


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


class Tile(NamedTuple):
    """Queries of a row and the keys that they see, of the prompt and then of their own; either may be empty."""

    queries: slice
    prompt: slice
    own: slice
    masked: int
    """Keys from here on, counted through both slices, are not seen by all queries."""
    several: bool
    """Whether its queries are those of several responses."""

    def part(self, whole: Tensor) -> Tensor:
        """[1, heads, L, x] of the tile's keys, [heads, keys, x]."""
        if self.prompt.start == self.prompt.stop:
            return whole[0, :, self.own]
        return torch.cat([whole[0, :, self.prompt], whole[0, :, self.own]], 1)

    def add(self, part: Tensor, whole: Tensor, alpha: float = 1.0) -> None:
        """Adds [heads, keys, x] to the tile's keys of [1, heads, L, x]."""
        cut = self.prompt.stop - self.prompt.start
        whole[0, :, self.prompt].add_(part[:, :cut], alpha=alpha)
        whole[0, :, self.own].add_(part[:, cut:], alpha=alpha)

    def hidden(self, settings: Settings, like: Tensor) -> Tensor:
        """What is added to the scores [queries, keys from `masked` on]: -inf where a query does not see a key."""
        if settings.window is None and not self.several:
            count = self.queries.stop - self.queries.start
            return torch.full((count, count), -torch.inf, dtype=like.dtype, device=like.device).triu_(1)
        _, segment, position = settings.segments.index
        queries = torch.arange(self.queries.start, self.queries.stop)
        spans = [torch.arange(span.start, span.stop) for span in (self.prompt, self.own)]
        keys = torch.cat(spans)[self.masked :]
        apart = position[queries, None] - position[keys]
        seen = (apart >= 0) & ((segment[queries, None] == segment[keys]) | (segment[keys] == 0))
        if settings.window is not None:
            seen &= apart < settings.window
        return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf).to(like.device)


def tiles(segments: Segments, window: int | None, heads: int) -> Iterator[Tile]:
    """Each query of the row is in one of them."""
    at = 0
    for prompt, responses in segments.groups:
        before = slice(at, at)
        for begin, end in _cut([prompt], 0, heads):
            yield _tile(slice(at + begin, at + end), before, slice(at, at + end), window)
        before, at = slice(at, at + prompt), at + prompt
        run: list[int] = []
        for length in (*responses, None):
            if run and (length is None or sum(run) + length > TILE_QUERIES):
                for begin, end in _cut(run, prompt, heads):
                    yield _tile(slice(at + begin, at + end), before, slice(at, at + end), window, len(run) > 1)
                at += sum(run)
                run = []
            if length:
                run.append(length)


def _cut(run: Sequence[int], prompt: int, heads: int) -> Iterator[tuple[int, int]]:
    """The queries of each tile of responses that share tiles, which several do only if they fit into one."""
    total = sum(run)
    step = max(1, min(TILE_QUERIES, TILE_BYTES // (4 * heads * (prompt + total))))
    if len(run) > 1:
        step = total
    for begin in range(0, total, step):
        yield begin, min(total, begin + step)


def _tile(queries: slice, prompt: slice, own: slice, window: int | None, several: bool = False) -> Tile:
    length = prompt.stop - prompt.start
    before = length + queries.start - own.start
    if window is None:
        return Tile(queries, prompt, own, length if several else before, several)
    # Keys that are too far from the first query, which is the earliest of one response.
    far = 0 if several else max(0, before - window + 1)
    prompt = slice(prompt.start + min(far, length), prompt.stop)
    return Tile(queries, prompt, slice(own.start + max(0, far - length), own.stop), 0, several)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: Settings
    ) -> Tensor:
        heads, length = query.shape[1:3]
        held, left = _Scratch(), None
        # In the order in which the output layer reads it.
        out = query.new_empty(1, length, heads, value.shape[3]).transpose(1, 2)
        if sinks is not None:
            left = torch.empty(1, heads, length, 1, dtype=_wide(query), device=query.device)
        for tile in tiles(settings.segments, settings.window, heads):
            scores = _scores(_grouped(query, key, tile), tile.part(key), tile, settings, held)
            shares = torch.softmax(scores, 2, out=held.like("shares", scores))
            part = _ungrouped(held.cast("narrow", shares, value.dtype) @ tile.part(value), heads)
            if sinks is not None and left is not None:
                # The log of the sum of exponentials, as the largest score and its share have it.
                lse = scores.amax(2, keepdim=True).sub_(shares.amax(2, keepdim=True).log_())
                mine = torch.sigmoid(_ungrouped(lse, heads) - sinks.to(left.dtype)[None, :, None, None])
                part, left[:, :, tile.queries] = part * mine, mine
            out[:, :, tile.queries] = part
        ctx.save_for_backward(query, key, value, sinks, out, left)
        ctx.settings = settings
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, sinks, out, left = ctx.saved_tensors
        settings, heads, wide, held = ctx.settings, query.shape[1], _wide(query), _Scratch()
        of_query, with_ones = torch.empty_like(query), _with_ones(value)
        of_key, of_value = (torch.zeros(each.shape, dtype=wide, device=each.device) for each in (key, value))
        of_sinks = None if sinks is None else torch.zeros(heads, dtype=wide, device=query.device)
        for tile in tiles(settings.segments, settings.window, heads):
            mine, keys, upstream = _grouped(query, key, tile), tile.part(key), _grouped(grad, key, tile)
            kept = (upstream.to(wide) * _grouped(out, key, tile)).sum(2, keepdim=True)
            scores = _scores(mine, keys, tile, settings, held)
            shares = torch.softmax(scores, 2, out=held.like("shares", scores))
            if of_sinks is not None:
                shares *= _grouped(left, key, tile)
                of_sinks -= (_ungrouped(kept, heads) * (1 - left[:, :, tile.queries])).sum((0, 2, 3))
            tile.add(held.cast("narrow", shares, value.dtype).transpose(1, 2) @ upstream, of_value)
            if settings.softcap is not None:
                shares *= 1 - (scores.clamp_min(-settings.softcap) / settings.softcap).square_()
            less_kept = torch.bmm(
                _with_negative(upstream, kept), tile.part(with_ones).transpose(1, 2),
                out=held.like("product", scores, grad.dtype),
            )  # fmt: skip
            of_scores = held.cast("narrow", shares.mul_(held.cast("scores", less_kept, wide)), query.dtype)
            of_query[:, :, tile.queries] = _ungrouped(_product(of_scores, keys, settings.scale), heads)
            tile.add(of_scores.transpose(1, 2) @ mine, of_key, settings.scale)
        return (
            of_query, of_key.to(key.dtype), of_value.to(value.dtype),
            None if sinks is None or of_sinks is None else of_sinks.to(sinks.dtype), None,
        )  # fmt: skip


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)


class _Scratch:
    """Memory by name, used for one tile after another: new memory is slower than what a tile does with it."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised, on the device of `like` and, unless told, in its dtype."""
        at, size = (name, dtype or like.dtype), math.prod(shape)
        if at not in self._held or self._held[at].numel() < size:
            self._held[at] = torch.empty(size, dtype=at[1], device=like.device)
        return self._held[at][:size].view(*shape)

    def like(self, name: str, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.take(name, values.shape, values, dtype)

    def cast(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` themselves where they have the dtype."""
        return values if values.dtype == dtype else self.like(name, values, dtype).copy_(values)


def _scores(queries: Tensor, keys: Tensor, tile: Tile, settings: Settings, held: _Scratch) -> Tensor:
    """[key heads, heads of each x queries, keys], in float32 or float64."""
    keys, wide = keys.transpose(1, 2), _wide(queries)
    shape = (*queries.shape[:2], keys.shape[2])
    scores = _product(queries, keys, settings.scale, out=held.take("product", shape, queries))
    if wide != queries.dtype:
        # A product in 16 bits is rounded to 16 bits; what that took is a product once more.
        rest = torch.baddbmm(scores, queries, keys, beta=-1, alpha=settings.scale, out=held.like("narrow", scores))
        scores = held.cast("scores", scores, wide).add_(held.cast("shares", rest, wide))
    if settings.softcap is not None:
        scores = scores.div_(settings.softcap).tanh_().mul_(settings.softcap)
    hidden = tile.hidden(settings, scores)
    scores.unflatten(1, (-1, len(hidden)))[..., tile.masked :] += hidden
    return scores


def _product(a: Tensor, b: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale a b, rounded once."""
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale, out=out)


def _with_ones(values: Tensor) -> Tensor:
    """[1, key heads, L, d + 2], the other side of `_with_negative`."""
    return torch.cat([values, values.new_ones(*values.shape[:3], 2)], 3)


def _with_negative(grad: Tensor, kept: Tensor) -> Tensor:
    """[key heads, n, d + 2]: a product with `_with_ones` has `kept` [key heads, n, 1] subtracted before it is rounded.

    Two numbers of 16 bits make nearly one of 32.
    """
    high = kept.to(grad.dtype)
    return torch.cat([grad, -high, (high - kept).to(grad.dtype)], 2)


def _grouped(values: Tensor, key: Tensor, tile: Tile) -> Tensor:
    """The tile's queries of [1, heads, L, x] as [key heads, heads of each x n, x]."""
    return values[:, :, tile.queries].reshape(key.shape[1], -1, values.shape[3])


def _ungrouped(values: Tensor, heads: int) -> Tensor:
    """[key heads, heads of each x n, x] as [1, heads, n, x]."""
    return values.reshape(1, heads, -1, values.shape[2])
