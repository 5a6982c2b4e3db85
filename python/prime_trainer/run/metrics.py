"""The run's record: `metrics.jsonl` and TensorBoard for numbers, `samples.jsonl` for responses."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .jsonl import JsonlWriter, keep_rows

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Stage = Literal["sft", "prm", "rl", "eval"]

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"


class MetricsWriter:
    """Appends to the record of `run_dir`.

    With `resume_step`, what the interrupted run wrote past that step in the resumed `stages` is dropped first, so a
    resumed run's record has every step once.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, stages: Sequence[Stage] = ("rl", "eval")) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tensorboard_dir = run_dir / "tensorboard"
        self._purge = {stage: resume_step + 1 for stage in stages} if resume_step is not None else {}
        if resume_step is not None:
            keep_rows(run_dir / METRICS, lambda row: row.get("stage") not in stages or row["step"] <= resume_step)
            if "rl" in stages:
                keep_rows(run_dir / SAMPLES, lambda row: row["step"] <= resume_step)
        self._metrics = JsonlWriter(run_dir / METRICS)
        self._samples = JsonlWriter(run_dir / SAMPLES)
        self._boards: dict[Stage, SummaryWriter] = {}

    def log(self, stage: Stage, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of one step; NaN and infinity become null."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._metrics.append([{"stage": stage, "step": step, "time": time.time(), **finite}])
        board = self._board(stage)
        for key, value in numbers.items():
            board.add_scalar(f"{stage}/{key}", value, step)
        board.flush()

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records responses of one step, one line each."""
        self._samples.append([_finite({"step": step, **sample}) for sample in samples])

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        for board in self._boards.values():
            board.close()

    def _board(self, stage: Stage) -> SummaryWriter:
        if stage not in self._boards:
            from torch.utils.tensorboard import SummaryWriter

            # A directory each: TensorBoard drops all that is past the purged step, and steps of stages differ.
            self._boards[stage] = SummaryWriter(
                str(self._tensorboard_dir / stage), purge_step=self._purge.get(stage), max_queue=1000
            )
        return self._boards[stage]


class NoMetrics:
    """The record of a rank that keeps none."""

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
