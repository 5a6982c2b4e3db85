"""Trackio."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .base import TrackedRun, tagged

_REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioTracker:
    """One Trackio run, in its local database unless its own environment variables name another place."""

    def __init__(self, run: TrackedRun) -> None:
        import trackio

        elsewhere = [name for name in _REMOTE if os.environ.get(name)]
        if run.tracking.local and elsewhere:
            raise ValueError(f"metrics.local = true sends nothing anywhere, but {elsewhere[0]} is set")
        # Trackio knows runs by their names.
        name = run.identity("trackio", lambda: f"{run.name}-{os.urandom(3).hex()}")
        self._run: Any = trackio.init(
            project=run.tracking.project, name=name, config=dict(run.config), resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log(tagged(stage, values), step=step)

    def close(self) -> None:
        self._run.finish()
