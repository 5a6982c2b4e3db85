"""ProcessBench (arXiv 2412.06559): where a chain of steps first goes wrong, from cumulative rewards.

The prediction is the first step with sigmoid(Q_k) < t, -1 (all right) if there is none. F1 is the harmonic mean of the
accuracy on chains with an error and of that on chains without. t is the best of 10,000 values on one set and is used
as it is on the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config.run_config import RunConfig
from ..data.readers import read_rows
from ..report.markdown import escaped, grid
from ..run.atomic_files import replace_file
from ..run.output_lock import owns_output

THRESHOLDS = 10_000
NOTHING = -2
"""No prediction: not even that all steps are right."""


@dataclass(frozen=True)
class Chain:
    """Cumulative rewards of the steps, none where it was too long to score, and the index of the first wrong one, -1
    where all are right."""

    cumulative: list[float]
    label: int


@dataclass(frozen=True)
class Figures:
    """Shares of chains whose prediction is right; F1 is 0 where one of the kinds is missing or never right. A chain
    without rewards (`unscored` of them) has no prediction and counts as not found, whichever its label."""

    set: str
    threshold: float
    erroneous: float
    correct: float
    f1: float
    chains: int
    unscored: int


@owns_output
def run(cfg: RunConfig) -> Path:
    """Writes `processbench.json` and `processbench.md` to `cfg.output`; returns the path of the table."""
    own = cfg.processbench
    if own.tune is None:
        raise ValueError("processbench.tune is required: the scored set on which the threshold is chosen")
    tuning = read_chains(own.tune, "processbench.tune")
    threshold = best_threshold(tuning)
    sets = [(own.tune, tuning), *((path, read_chains(path, "processbench.paths")) for path in own.paths)]
    rows = [figures(path.parent.name if path.stem == "scores" else path.stem, c, threshold) for path, c in sets]
    cfg.output.mkdir(parents=True, exist_ok=True)
    replace_file(cfg.output / "processbench.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    cells = [
        [escaped(r.set), *(f"{100 * share:.1f}" for share in (r.erroneous, r.correct, r.f1)), r.chains] for r in rows
    ]
    lines = [f"Threshold {threshold:.6g} on sigmoid(Q), chosen on {rows[0].set}.", ""]
    lines.append(grid(["set", "erroneous", "correct", "F1", "chains"], cells).rstrip())
    for r in rows:
        if r.unscored:
            lines += ["", f"{r.set}: {r.unscored} of {r.chains} chains have no rewards and count as not found."]
    table = cfg.output / "processbench.md"
    replace_file(table, "\n".join(lines) + "\n")
    return table


def read_chains(path: Path, key: str) -> list[Chain]:
    chains = []
    for place, row in read_rows(path, key):
        label = row.get("label")
        if "rewards" not in row or not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(
                f"{path}, {place}: needs rewards (from `prime-trainer score`) and label, the first wrong step"
            )
        cumulative = [] if row["rewards"] is None else _cumulative(row["rewards"])
        if cumulative is None:
            raise ValueError(f"{path}, {place}: rewards.cumulative must be a list of finite numbers, one a step")
        # How many steps a chain without rewards has is not known here.
        if not -1 <= label < (len(cumulative) or math.inf):
            raise ValueError(f"{path}, {place}: label must be -1 or one of {len(cumulative)} steps, got {label}")
        chains.append(Chain(cumulative, label))
    if not any(chain.cumulative for chain in chains):
        raise ValueError(f"{key}: {path} has no rows{' with rewards' if chains else ''}")
    return chains


def _cumulative(rewards: Any) -> list[float] | None:
    """None where they are not there."""
    values = rewards.get("cumulative") if isinstance(rewards, dict) else None
    if not isinstance(values, list) or not values:
        return None
    return values if all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) else None


def predict(chain: Chain, thresholds: np.ndarray) -> np.ndarray:
    """The predicted step for every threshold; `NOTHING` for a chain without rewards."""
    if not chain.cumulative:
        return np.full(len(thresholds), NOTHING)
    # The first value below t comes where the running minimum first is; that falls, so its negative is sorted.
    lowest = -np.minimum.accumulate(_sigmoid(chain.cumulative))
    first = np.searchsorted(lowest, -thresholds, side="right")
    return np.where(first < len(lowest), first, -1)


def best_threshold(chains: Sequence[Chain]) -> float:
    """The threshold of highest F1, the lowest of equals, of 10,000 evenly spaced from the lowest to the highest value
    of sigmoid(Q_k): with a small beta all values crowd around one half, where a grid on [0, 1] would miss them."""
    values = np.concatenate([_sigmoid(chain.cumulative) for chain in chains])
    thresholds = np.linspace(values.min(), values.max(), THRESHOLDS)
    return float(thresholds[np.argmax(_shares(chains, thresholds)[2])])


def figures(name: str, chains: Sequence[Chain], threshold: float) -> Figures:
    erroneous, correct, f1 = (float(share[0]) for share in _shares(chains, np.array([threshold])))
    unscored = sum(not chain.cumulative for chain in chains)
    return Figures(name, threshold, erroneous, correct, f1, len(chains), unscored)


def _shares(chains: Sequence[Chain], thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    right = {True: np.zeros(len(thresholds)), False: np.zeros(len(thresholds))}
    count = {True: 0, False: 0}
    for chain in chains:
        wrong = chain.label >= 0
        right[wrong] += predict(chain, thresholds) == chain.label
        count[wrong] += 1
    erroneous, correct = (right[kind] / max(1, count[kind]) for kind in (True, False))
    both = erroneous + correct
    return erroneous, correct, 2 * erroneous * correct / np.where(both > 0, both, 1.0)


def _sigmoid(values: Sequence[float]) -> np.ndarray:
    return 0.5 * (1 + np.tanh(np.asarray(values, dtype=np.float64) / 2))
