"""What a run directory says about its run, read back for the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run.jsonl import read_jsonl, read_object
from ..run.metrics import METRICS, SAMPLES

_SAMPLE = {"step", "prompt", "tokens", "outcome", "reference"}
"""What the page needs of each."""


@dataclass(frozen=True)
class Record:
    """The metrics, samples and configuration of one run."""

    path: Path
    metrics: dict[str, dict[int, dict[str, Any]]]
    """`metrics[stage][step]`: the values of that step."""
    samples: list[dict[str, Any]]
    config: dict[str, Any]

    def series(self, stage: str, key: str) -> tuple[list[int], list[float]]:
        """Returns the steps at which `key` has a value, in order, and the values."""
        rows = sorted(self.metrics.get(stage, {}).items())
        found = [(step, row[key]) for step, row in rows if row.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    def setting(self, *keys: str) -> Any:
        """Returns a value of the configuration, or None."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def label(self) -> str:
        seed = self.setting("seed")
        return self.path.name if seed is None else f"seed {seed}"


def read_record(run_dir: Path) -> Record:
    """Reads a run directory. Raises FileNotFoundError or ValueError, with the path, if it holds no metrics."""
    path = run_dir / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} has no {METRICS}: not the directory of a run, or it logged nothing yet")
    metrics: dict[str, dict[int, dict[str, Any]]] = {}
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with stage and step, got {row!r:.100}")
        metrics.setdefault(row["stage"], {})[row["step"]] = row
    if not metrics:
        raise ValueError(f"{path} is empty: the run logged nothing yet")
    samples, config = run_dir / SAMPLES, run_dir / "config.json"
    return Record(
        run_dir.resolve(),
        metrics,
        _samples(samples),
        read_object(config) if config.exists() else {},
    )


def _samples(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        missing = _SAMPLE - row.keys() if isinstance(row, dict) else _SAMPLE
        if missing:
            raise ValueError(f"{path}, line {number}: a sample needs {', '.join(sorted(missing))}")
    return rows
