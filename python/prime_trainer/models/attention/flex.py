"""Attention of a row through torch's FlexAttention: one compiled kernel, which skips tiles that nothing sees."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .segments import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .blockwise import Settings

TILE = 128


def attention(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, settings: Settings) -> Tensor:
    """As `blockwise.attention`. CPUs have no backward pass, and no sinks (torch 2.9 to 2.13)."""
    from torch.nn.attention.flex_attention import AuxRequest

    per_key = query.shape[1] // key.shape[1]
    if per_key & (per_key - 1):  # its kernels share keys by powers of two
        key, value = (each.repeat_interleave(per_key, 1) for each in (key, value))
    found = _run(query)(
        query, key, value,
        score_mod=None if settings.softcap is None else _capped(settings.softcap),
        block_mask=block_mask(settings.segments, settings.window, query.device),
        scale=settings.scale, enable_gqa=query.shape[1] != key.shape[1],
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is None:
        whole: Tensor = found
        return whole
    out, aux = found
    kept = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
    return (out * kept.unsqueeze(3)).to(query.dtype)


@functools.lru_cache(maxsize=4)
def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """The row's mask: a rule for pairs of tokens, and which tiles of pairs have some or only such that are seen."""
    from torch.nn.attention.flex_attention import BlockMask

    owner, segment, position = segments.index.to(device)

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = (owner[query] == owner[key]) & ((segment[query] == segment[key]) | (segment[key] == 0))
        apart = position[query] - position[key]
        if window is None:
            return own & (apart >= 0)
        return own & (apart >= 0) & (apart < window)

    some, every = tiles(segments, window)
    return BlockMask.from_kv_blocks(
        *_listed(some & ~every, device), *_listed(every, device), BLOCK_SIZE=TILE, mask_mod=seen,
        seq_lengths=(segments.length, segments.length),
    )  # fmt: skip


def tiles(segments: Segments, window: int | None) -> tuple[Tensor, Tensor]:
    """bool [L / TILE, L / TILE] twice: tiles with pairs that may be seen, and tiles of which all pairs are."""
    count = -(-segments.length // TILE)
    some, every = (torch.zeros(count, count, dtype=torch.bool) for _ in range(2))
    far = segments.length if window is None else window
    for block in segments.blocks(window):
        (rows, begin, end, within), (columns, first, last, between) = map(_spans, (block.queries, block.keys))
        # The least and the greatest distance of a key before a query, in each tile.
        least = block.gap + begin[:, None] - last
        most = block.gap + end[:, None] - first
        some[rows, columns] |= (most >= 0) & (least < far)
        every[rows, columns] |= (least >= 0) & (most < far) & within[:, None] & between
    return some, every


def _spans(tokens: slice) -> tuple[slice, Tensor, Tensor, Tensor]:
    """The tiles that a block's tokens are in: (which, first and last token of each in the block, whether it has no
    others)."""
    found = torch.arange(tokens.start // TILE, -(-tokens.stop // TILE))
    begin, end = found * TILE, (found + 1) * TILE
    within = (begin >= tokens.start) & (end <= tokens.stop)
    return (
        slice(int(found[0]), int(found[-1]) + 1), begin.clamp_min(tokens.start) - tokens.start,
        end.clamp_max(tokens.stop) - 1 - tokens.start, within,
    )  # fmt: skip


def _listed(chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of tiles [n, n]: how many a row has [1, 1, n], and which, they before the others [1, 1, n, n]."""
    which = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1, dtype=torch.int32)[None, None].to(device), which.int()[None, None].contiguous().to(device)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


def _run(query: Tensor) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation it makes the scores of all pairs: a reference for tests, on CPUs alone.
    return _compiled() if query.is_cuda else flex_attention


@functools.cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
