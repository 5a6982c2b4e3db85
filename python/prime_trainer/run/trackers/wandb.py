"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .base import TrackedRun, tagged


class WandbTracker:
    """One W&B run. Steps of stages differ, so each stage has its own step axis, `STAGE/step`."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        # No look at the console, and no prompt for a key that would wait for an answer.
        settings = wandb.Settings(silent=True, console="off", login_timeout=10)
        self._run: Any = wandb.init(
            project=run.tracking.project, name=run.name, id=run.identity("wandb"), resume="allow", dir=run.folder,
            mode="offline" if run.tracking.local else None, config=dict(run.config), settings=settings,
        )  # fmt: skip
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        if stage not in self._stages:
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log(tagged(stage, values) | {f"{stage}/step": step})

    def close(self) -> None:
        self._run.finish()
