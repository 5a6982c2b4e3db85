"""What a tracker is, and what it knows of the run."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...config.sections import MetricsConfig
from .. import atomic_files


class Tracker(Protocol):
    """One place that shows a run's numbers. Whatever it raises switches it off (guarded.py)."""

    def log(self, stage: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class TrackedRun:
    """A run as its trackers see it."""

    folder: Path
    tracking: MetricsConfig
    config: Mapping[str, Any]
    """The run's whole configuration, as JSON has it."""
    purge: Mapping[str, int]
    """Of a resumed run: the first step of each resumed stage that is logged again."""

    @property
    def name(self) -> str:
        return self.tracking.name or self.folder.resolve().name

    def identity(self, tracker: str, fresh: Callable[[], str] = lambda: uuid.uuid4().hex[:12]) -> str:
        """What `tracker` knows this run by, kept in its folder: a resumed run goes on as the same one."""
        path = self.folder / "trackers" / f"{tracker}.id"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            atomic_files.replace_file(path, fresh())
        return path.read_text(encoding="utf-8").strip()


def tagged(stage: str, values: Mapping[str, float]) -> dict[str, float]:
    """Finite values under `stage/key`: not every tracker takes NaN."""
    return {f"{stage}/{key}": value for key, value in values.items() if math.isfinite(value)}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted keys."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
