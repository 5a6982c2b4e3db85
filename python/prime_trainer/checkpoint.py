"""A run's state on disk: written beside the last one and renamed, so that a torn checkpoint is never picked up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"


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
