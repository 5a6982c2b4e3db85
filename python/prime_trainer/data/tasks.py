"""Where problems come from: procedural reasoning-gym datasets, or files in the Eurus-2-RL-Data schema.

A training stream is addressed by position, so a resumed run goes on where it was: `train(start, count)` always gives
the same problems for the same seed.
"""

from __future__ import annotations

from ..config.sections import TaskConfig
from .problems import Task
from .reasoning_gym import ReasoningGymTask


def load_task(cfg: TaskConfig, seed: int) -> Task:
    """Opens the task that `cfg` describes. Raises ValueError, naming the option, for whatever is wrong with it."""
    if cfg.kind == "reasoning_gym":
        return ReasoningGymTask(cfg, seed)
    from .file_task import FileTask

    return FileTask(cfg, seed)
