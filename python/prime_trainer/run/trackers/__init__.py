"""Where a run's numbers go beside `metrics.jsonl`, a file for each tracker; its package is imported when it starts."""

from __future__ import annotations

from collections.abc import Callable

from ...config.sections import TrackerName
from .base import TrackedRun, Tracker
from .guarded import Background, Guarded

__all__ = ["TrackedRun", "Tracker", "start"]


def start(run: TrackedRun) -> list[Tracker]:
    """The trackers of a run. None of them raises."""
    return [_start(name, run) for name in dict.fromkeys(run.tracking.trackers)]


def _start(name: TrackerName, run: TrackedRun) -> Tracker:
    guard: Callable[[str, Callable[[], Tracker]], Tracker] = Guarded if name == "tensorboard" else Background
    return guard(name, lambda: _make(name, run))


def _make(name: TrackerName, run: TrackedRun) -> Tracker:
    if name == "tensorboard":
        from .tensorboard import TensorBoardTracker

        return TensorBoardTracker(run)
    if name == "wandb":
        from .wandb import WandbTracker

        return WandbTracker(run)
    if name == "trackio":
        from .trackio import TrackioTracker

        return TrackioTracker(run)
    from .mlflow import MlflowTracker

    return MlflowTracker(run)
