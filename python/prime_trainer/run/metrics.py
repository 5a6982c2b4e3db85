"""The run's record: `metrics.jsonl` and trackers for numbers, `samples.jsonl` for responses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from ..config.sections import MetricsConfig
from . import trackers
from .jsonl import JsonlWriter, keep_rows

Stage = Literal["sft", "prm", "rl", "eval"]

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class Metrics(Protocol):
    """A run's record, or the stand-in of a rank that keeps none."""

    def log(self, stage: Stage, step: int, values: Mapping[str, float]) -> None: ...

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends to the record of `run_dir`.

    With `resume_step`, what the interrupted run wrote past that step in the resumed `stages` is dropped first, so a
    resumed run's record has every step once. `tracking` says which trackers are told, `config` what they are told of
    the run's configuration.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None,
        stages: Sequence[Stage] = ("rl", "eval"),
        *,
        tracking: MetricsConfig | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        purge: dict[str, int] = {}
        if resume_step is not None:
            purge = dict.fromkeys(stages, resume_step + 1)
            keep_rows(run_dir / METRICS, lambda row: row.get("stage") not in stages or row["step"] <= resume_step)
            if "rl" in stages:
                keep_rows(run_dir / SAMPLES, lambda row: row["step"] <= resume_step)
        self._metrics = JsonlWriter(run_dir / METRICS)
        self._samples = JsonlWriter(run_dir / SAMPLES)
        tracked = trackers.TrackedRun(run_dir, tracking or MetricsConfig(), config or {}, purge)
        self._trackers = trackers.start(tracked)

    def log(self, stage: Stage, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of one step; NaN and infinity become null."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._metrics.append([{"stage": stage, "step": step, "time": time.time(), **finite}])
        for tracker in self._trackers:
            tracker.log(stage, step, numbers)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records responses of one step, one line each."""
        self._samples.append([_finite({"step": step, **sample}) for sample in samples])

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        for tracker in self._trackers:
            tracker.close()


class NoMetrics:
    """For ranks that write no metrics."""

    def log(self, stage: Stage, step: int, values: Mapping[str, float]) -> None:
        pass

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        pass

    def close(self) -> None:
        pass


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value
