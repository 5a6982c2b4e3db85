"""One engine for all ranks: the first rank samples for all, and its errors are raised on all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..models.loading import NamedTensors, pairs
from ..scale.ranks import Ranks
from .sampler import LogitsDtype, Sample, Sampler, Sampling


class SharedSampler:
    """Every rank must make the same calls in the same order."""

    def __init__(self, make: Callable[[], Sampler], ranks: Ranks) -> None:
        self.ranks = ranks
        self.engine: Sampler | None = None
        self.version = -1

        def build() -> tuple[int | None, LogitsDtype]:
            self.engine = make()
            return self.engine.limit, self.engine.logits_dtype

        self.limit, self.logits_dtype = ranks.once(build)

    @property
    def _first(self) -> Sampler:
        """On the first rank, where alone it is used."""
        if self.engine is None:
            raise RuntimeError(f"rank {self.ranks.rank} has no engine: the first rank drives it for all")
        return self.engine

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        asked = self.ranks.gather((list(prompts), list(seeds)))
        everyone, all_seeds = ([item for part in column for item in part] for column in zip(*asked, strict=True))
        found = self.ranks.once(lambda: self._first.generate(everyone, n, sampling, all_seeds))
        first = sum(len(part) for part, _ in asked[: self.ranks.rank])
        return found[first : first + len(prompts)]

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        if not isinstance(named_tensors, Mapping):
            # Whole tensors are put together by all ranks, one after the other; the others need not keep them.
            named_tensors = {name: tensor for name, tensor in pairs(named_tensors) if self.ranks.first}
        tensors, self.version = named_tensors, -1
        self.ranks.once(lambda: self._first.update_weights(tensors, version))
        self.version = version

    def release(self) -> None:
        if self.engine is not None:
            self.engine.release()

    def restart(self) -> None:
        self.version = -1
        self.ranks.once(lambda: self._first.restart())

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
