"""Seconds a stage of a step takes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch.profiler import record_function


class StageClock:
    """`with clock("policy"):` adds the block's time to a stage; `stages()` returns the seconds of each as metrics.

    In a profile the block is the row `prime/policy`.
    """

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.spent: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with record_function(f"prime/{stage}"):
                yield
        finally:
            self.spent[stage] = self.spent.get(stage, 0.0) + time.perf_counter() - begin

    def stages(self) -> dict[str, float]:
        return {f"time/{stage}": seconds for stage, seconds in self.spent.items()}

    def times(self) -> dict[str, float]:
        """The stages, and `time/total` since the clock was made."""
        return self.stages() | {"time/total": time.perf_counter() - self.start}
