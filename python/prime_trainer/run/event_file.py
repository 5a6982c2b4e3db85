"""TensorBoard's event files, written as they are logged.

torch's writer hands events to a thread: where the disk is full or the folder gone, that thread ends with a traceback of
its own and the run goes on without a record.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EventFile:
    """A new file of scalars in `directory`; TensorBoard drops what older files there have from `purge_step` on."""

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
