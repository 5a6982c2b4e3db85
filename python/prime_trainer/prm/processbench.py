"""ProcessBench (arXiv 2412.06559): where a chain of steps first goes wrong, from cumulative rewards.

The prediction is the first step with sigmoid(Q_k) < t, -1 (all right) if there is none. F1 is the harmonic mean of the
accuracy on chains with an error and of that on chains without. t is the best of 10,000 values on one set and is used
as it is on the others.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..config import RunConfig
from ..rows import read_rows

THRESHOLDS = 10_000


@dataclass(frozen=True)
class Chain:
    """Cumulative rewards of the steps and the index of the first wrong one, -1 where all are right."""

    cumulative: list[float]
    label: int


@dataclass(frozen=True)
class Figures:
    """Shares of chains whose prediction is right; F1 is 0 where one of the kinds is missing or never right."""

    set: str
    threshold: float
    erroneous: float
    correct: float
    f1: float
    chains: int


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
    document = json.dumps([asdict(row) for row in rows], indent=1)
    (cfg.output / "processbench.json").write_text(document + "\n", encoding="utf-8")
    lines = [f"Threshold {threshold:.6g} on sigmoid(Q), chosen on {rows[0].set}.", ""]
    lines += ["| set | erroneous | correct | F1 | chains |", "| --- | --- | --- | --- | --- |"]
    for r in rows:
        lines.append(f"| {r.set} | {100 * r.erroneous:.1f} | {100 * r.correct:.1f} | {100 * r.f1:.1f} | {r.chains} |")
    table = cfg.output / "processbench.md"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def read_chains(path: Path, key: str) -> list[Chain]:
    chains = []
    for place, row in read_rows(path, key):
        rewards, label = row.get("rewards"), row.get("label")
        if not isinstance(rewards, dict) or not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(
                f"{path}, {place}: needs rewards (from `prime-trainer score`) and label, the first wrong step"
            )
        if not -1 <= label < len(rewards["cumulative"]):
            raise ValueError(
                f"{path}, {place}: label must be -1 or one of {len(rewards['cumulative'])} steps, got {label}"
            )
        chains.append(Chain(rewards["cumulative"], label))
    if not chains:
        raise ValueError(f"{key}: {path} has no rows")
    return chains


def predict(chain: Chain, thresholds: np.ndarray) -> np.ndarray:
    """The predicted step for every threshold."""
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
    return Figures(name, threshold, erroneous, correct, f1, len(chains))


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
