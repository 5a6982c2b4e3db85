"""Where the numbers of a run go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Section

TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class MetricsConfig(Section):
    """Beside `metrics.jsonl`, which every run writes."""

    trackers: list[TrackerName] = Field(default=["tensorboard"])
    """Each has its own package. One that is missing or fails is switched off with a message and never stops a run."""
    project: str = Field(default="prime-trainer", min_length=1)
    """The project of W&B and Trackio, the experiment of MLflow."""
    name: str | None = Field(default=None, min_length=1)
    """What they call this run; without it, the name of the folder `output`."""
    local: bool = False
    """Send nothing anywhere: W&B in its offline mode, MLflow in files, both in `output`; Trackio is local anyway. Off,
    they go where their own environment variables and logins say."""
