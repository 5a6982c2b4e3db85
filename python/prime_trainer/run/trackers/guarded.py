"""Trackers whose failure, or slowness, is never the run's."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from queue import SimpleQueue

from .base import Tracker

CLOSE_SECONDS = 60.0
"""What a tracker may take, after the last step, to send what it still has."""


class Guarded:
    """A tracker that is made and called here and now; what it raises is one message, and its end."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "_tracker", make()))

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._attempt(lambda: tracker.log(stage, step, values))

    def close(self) -> None:
        if self._tracker is not None:
            self._attempt(self._tracker.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._tracker = None
            report(self.name, error)


class Background:
    """A tracker that lives in a thread of its own, as it may wait for a server; steps do not wait for it."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.name = name
        self._rows: SimpleQueue[tuple[str, int, dict[str, float]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(make,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if self._thread.is_alive():  # after a failure nobody reads them
            self._rows.put((stage, step, dict(values)))

    def close(self) -> None:
        self._rows.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            print(
                f"metrics.trackers: {self.name} has not finished after {CLOSE_SECONDS:g} s; it may lack the last "
                "values, which metrics.jsonl has",
                file=sys.stderr,
            )

    def _run(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            while (row := self._rows.get()) is not None:
                tracker.log(*row)
            tracker.close()
        except BaseException as error:  # some end their process where they are not configured
            report(self.name, error)


def report(name: str, error: BaseException) -> None:
    """Says that a tracker is off."""
    if isinstance(error, ModuleNotFoundError):
        why = f"the package {error.name!r} is missing: pip install {name}"
    else:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
    print(
        f"metrics.trackers: {name} is switched off, the run goes on and metrics.jsonl has every value ({why})",
        file=sys.stderr,
    )
