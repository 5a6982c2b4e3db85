"""A run's state on disk: written beside the last one and renamed, so that a torn checkpoint is never picked up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from .config import RunConfig
from .environment import environment
from .metrics import METRICS

STATE = "state.pt"
FREE_ON_RESUME = {"steps", "resume", "output", "eval", "checkpoint", "micro_batch_tokens"}
"""What a resumed run may change and still be the same run: its length, its place, its memory and its reporting."""


def begin(cfg: RunConfig) -> dict[str, Any] | None:
    """The state to go on from, None for a new run. Refuses to overwrite a run or to resume another one."""
    if not cfg.resume:
        if (cfg.output / METRICS).exists():
            raise ValueError(f"{cfg.output} already holds a run; give another --output, or --resume to continue it")
        return None
    state = load_latest(cfg.output)
    if state is None:
        raise ValueError(f"--resume: {cfg.output} has no checkpoint to go on from")
    old, new = json.loads(state["config"]), json.loads(cfg.model_dump_json())
    for config in (old, new):
        config["rollout"].pop("server", None)  # where the engine runs changes nothing
    check_unchanged(old, new, [key for key in new if key not in FREE_ON_RESUME])
    return state


def check_unchanged(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError where a setting that decides the results is not what the interrupted run had."""
    changed = [key for key in keys if old.get(key) != new[key]]
    if changed:
        detail = "; ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in changed)
        raise ValueError(f"--resume: the configuration has changed ({detail})")


def write_config(cfg: RunConfig) -> None:
    """The resolved configuration and what the run runs on, beside what it writes."""
    cfg.output.mkdir(parents=True, exist_ok=True)
    (cfg.output / "config.json").write_text(cfg.model_dump_json(indent=2))
    (cfg.output / "environment.json").write_text(json.dumps(environment(), indent=2))


def save(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoints/step_N and removes all but the newest `keep`."""
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    partial = root / f".step_{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        torch.save(state, partial / STATE)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    for old in _all(run_dir)[:-keep]:
        shutil.rmtree(old)
    return target


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest state, tensors mapped from the file; None where there is none. Only plain data is unpickled."""
    found = _all(run_dir)
    return torch.load(found[-1] / STATE, map_location="cpu", weights_only=True, mmap=True) if found else None


def _all(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*"))
