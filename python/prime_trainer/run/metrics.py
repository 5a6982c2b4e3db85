"""The run's record: `metrics.jsonl` and TensorBoard for numbers, `samples.jsonl` for responses."""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

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
    resumed run's record has every step once.
    """

    def __init__(self, run_dir: Path, resume_step: int | None, stages: Sequence[Stage] = ("rl", "eval")) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        self._purge = {stage: resume_step + 1 for stage in stages} if resume_step is not None else {}
        if resume_step is not None:
            keep_rows(run_dir / METRICS, lambda row: row.get("stage") not in stages or row["step"] <= resume_step)
            if "rl" in stages:
                keep_rows(run_dir / SAMPLES, lambda row: row["step"] <= resume_step)
        self._metrics = JsonlWriter(run_dir / METRICS)
        self._samples = JsonlWriter(run_dir / SAMPLES)
        self._boards: dict[Stage, EventFile] = {}

    def log(self, stage: Stage, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of one step; NaN and infinity become null."""
        numbers = {key: float(value) for key, value in values.items()}
        finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        self._metrics.append([{"stage": stage, "step": step, "time": time.time(), **finite}])
        self._board(stage).log({f"{stage}/{key}": value for key, value in numbers.items()}, step)

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Records responses of one step, one line each."""
        self._samples.append([_finite({"step": step, **sample}) for sample in samples])

    def close(self) -> None:
        self._metrics.close()
        self._samples.close()
        for board in self._boards.values():
            board.close()

    def _board(self, stage: Stage) -> EventFile:
        if stage not in self._boards:
            # A directory each: TensorBoard drops all that is past the purged step, and steps of stages differ.
            self._boards[stage] = EventFile(self._run_dir / "tensorboard" / stage, self._purge.get(stage))
        return self._boards[stage]


class EventFile:
    """A new file of scalars for TensorBoard, which drops what older files there have from `purge_step` on.

    Written as it is logged: torch's writer has a thread for it, which ends with a traceback of its own where the disk
    is full or the folder gone, while the run goes on without a record.
    """

    def __init__(self, directory: Path, purge_step: int | None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        number = 0
        while (path := directory / f"{name}.{number}").exists():
            number += 1
        self._file = path.open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if purge_step is not None:
            self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self._file.flush()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One event for each tag. Raises OSError where it cannot be written."""
        for tag, value in values.items():
            self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=tag, simple_value=value)]))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


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
