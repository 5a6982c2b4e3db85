"""Rows of prompts, each followed by its responses: what each token sees, without a mask of all pairs of tokens.

A response sees its prompt and itself, a prompt itself only. What a row attends to is then a list of blocks, each a
rectangle of queries and keys within which position alone decides; their number grows with the responses, and in layers
with windows with the tokens, never with the square of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

WINDOW_QUERIES = 256
"""Queries of a block at most where a window cuts across it: such blocks take a mask of their own."""


class Block(NamedTuple):
    """Queries and keys of a row. Key j of the block is seen by query i where 0 <= gap + i - j < window."""

    queries: slice
    keys: slice
    gap: int
    """Position of the first query less that of the first key."""
    kind: Literal["full", "causal", "band"]
    """`full`: all pairs; `causal`: a square, each query sees the keys up to its own; `band`: anything else."""
    first: bool
    """Whether these queries have no block before; each query is in one block of its own segment, the first."""

    def seen(self, window: int | None, device: torch.device | str) -> Tensor:
        """bool [queries, keys]."""
        queries, keys = (torch.arange(s.stop - s.start, device=device) for s in (self.queries, self.keys))
        apart = self.gap + queries[:, None] - keys
        seen = apart >= 0
        return seen if window is None else seen & (apart < window)


@dataclass(frozen=True)
class Segments:
    """A row of groups end to end: (tokens of the prompt, tokens of each response) of each."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @cached_property
    def length(self) -> int:
        return sum(prompt + sum(responses) for prompt, responses in self.groups)

    @cached_property
    def index(self) -> Tensor:
        """[3, L] of each token: its group in the row, its segment (0 the prompt, k the k-th response), its position."""
        owner, segment, position = [], [], []
        for group, (prompt, responses) in enumerate(self.groups):
            for k, length in enumerate((prompt, *responses)):
                owner.append(torch.full((length,), group))
                segment.append(torch.full((length,), k))
                position.append(torch.arange(length) + (prompt if k else 0))
        return torch.stack([torch.cat(owner), torch.cat(segment), torch.cat(position)])

    @property
    def positions(self) -> Tensor:
        """[L] of each token in its sequence."""
        return self.index[2]

    def seen(self, device: torch.device | str = "cpu") -> Tensor:
        """bool [1, 1, L, L], of all pairs of tokens: for models and shapes that read nothing else."""
        owner, segment, _ = self.index.to(device)
        return visible(owner[None], segment[None])

    def blocks(self, window: int | None) -> list[Block]:
        """What the row attends to, in the order of its queries within segments and then those that see a prompt."""
        own: list[Block] = []
        shared: list[Block] = []
        at = 0
        for prompt, responses in self.groups:
            keys = slice(at, at + prompt)
            own += _own(at, prompt, window)
            at += prompt
            first = at
            for length in responses:
                own += _own(at, length, window)
                at += length
            if not responses or at == first:
                continue
            if window is None or prompt + max(responses) <= window:
                # All pairs, whichever response a query is of: one block.
                shared.append(Block(slice(first, at), keys, prompt, "full", False))
            else:
                for length in responses:
                    shared += _windowed(first, length, keys, window)
                    first += length
        return own + shared


def _own(start: int, length: int, window: int | None) -> Iterator[Block]:
    """A segment's tokens among themselves."""
    if length and (window is None or length <= window):
        span = slice(start, start + length)
        yield Block(span, span, 0, "causal", True)
    elif length and window is not None:
        for begin in range(0, length, WINDOW_QUERIES):
            end = min(length, begin + WINDOW_QUERIES)
            low = max(0, begin - window + 1)
            yield Block(slice(start + begin, start + end), slice(start + low, start + end), begin - low, "band", True)


def _windowed(start: int, length: int, keys: slice, window: int) -> Iterator[Block]:
    """The tokens of a response that a window lets see its prompt, and what they see of it."""
    prompt = keys.stop - keys.start
    last = min(length, window - 1)
    for begin in range(0, last, WINDOW_QUERIES):
        end = min(last, begin + WINDOW_QUERIES)
        low = max(0, prompt + begin - window + 1)
        # The last query is the farthest from the first key.
        kind: Literal["full", "band"] = "full" if prompt + end - 1 - low < window else "band"
        yield Block(
            slice(start + begin, start + end), slice(keys.start + low, keys.stop), prompt + begin - low, kind, False
        )


def visible(owner: Tensor, segment: Tensor) -> Tensor:
    """bool [b, 1, L, L]: what each token of a row sees. `owner` [b, L] says which group of the row it is of, `segment`
    [b, L] 0 for the prompt and k for the k-th response; padding has groups and segments of its own."""
    same = owner[:, :, None] == owner[:, None, :]
    own = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    width = owner.shape[1]
    return (same & own & torch.ones(width, width, dtype=torch.bool, device=owner.device).tril())[:, None]
