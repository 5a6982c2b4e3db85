"""Event files for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .base import TrackedRun


class TensorBoardTracker:
    """A directory of event files for each stage under `tensorboard/` of the run."""

    def __init__(self, run: TrackedRun) -> None:
        import tensorboard.compat.proto.event_pb2  # noqa: F401  # what is missing is known at the start

        self._run = run
        self._boards: dict[str, EventFile] = {}

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._boards:
            # A directory each: TensorBoard drops all that is past the purged step, and steps of stages differ.
            folder = self._run.folder / "tensorboard" / stage
            self._boards[stage] = EventFile(folder, self._run.purge.get(stage))
        self._boards[stage].log({f"{stage}/{key}": value for key, value in values.items()}, step)

    def close(self) -> None:
        for board in self._boards.values():
            board.close()


class EventFile:
    """A new file of scalars for TensorBoard, which drops what older files there have from `purge_step` on.

    Written as it is logged: torch's writer has a thread for it, which ends with a traceback of its own where the disk
    is full or the folder gone.
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
