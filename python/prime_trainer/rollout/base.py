"""The sampler protocol: small, so that an engine is one file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One response. `ids` has the stop token where there was one; `logprobs` are the engine's own, one a token."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int


class Sampler(Protocol):
    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """`n` responses a prompt. `seeds` has one seed a prompt; a response depends on it, its index and the weights
        alone, never on the caller's random state."""

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...

    def close(self) -> None: ...


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, step, ..), the same on every machine and in every version of Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
