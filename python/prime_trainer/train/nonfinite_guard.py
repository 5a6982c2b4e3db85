"""Skips non-finite steps; stops the run after `max_skipped` in a row."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError
from ..run.atomic_files import replace_file
from .batch import Batch

BATCH = "skipped_batch.json"


class TooManySkipped(RunError):
    """Several steps in a row had no finite loss or gradient."""


class Skips:
    """Counts a run's skipped optimizer steps; `in_row` of them are steps of the loop that lost at least one."""

    def __init__(self, limit: int, key: str = "policy.max_skipped", rates: str = "policy.lr or prm.lr") -> None:
        """`key` is the setting that gave the limit, `rates` those of the learning rates, for the message."""
        self.limit, self.key, self.rates, self.total, self.in_row = limit, key, rates, 0, 0

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_row": self.in_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total, self.in_row = state["total"], state["in_row"]

    def note(self, skipped: int) -> dict[str, float]:
        """Counts what one step of the loop skipped; its metric."""
        self.total += skipped
        self.in_row = self.in_row + 1 if skipped else 0
        return {"skipped": skipped}

    def check(self, step: int, batch: Batch | None, output: Path) -> None:
        """Raises TooManySkipped, with the batch (if given) on disk, when the limit is reached."""
        if self.in_row < self.limit:
            return
        path = output / BATCH
        if batch is not None and batch.ranks.first:
            replace_file(path, json.dumps({"step": step, "groups": [asdict(group) for group in batch.groups]}))
        kept = "" if batch is None else f" and the last batch is in {path}"
        raise TooManySkipped(
            f"step {step}: no finite loss or gradient for {self.in_row} steps in a row ({self.key}); their updates "
            f"were skipped{kept}. Start anew with a lower {self.rates}, or --resume with a higher limit"
        )


def finite(*values: Tensor | None) -> bool:
    """Whether all numbers are; waits for the device once."""
    found = [torch.isfinite(value).all() for value in values if value is not None]
    return not found or bool(torch.stack(found).all())
