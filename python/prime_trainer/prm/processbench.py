"""ProcessBench (arXiv 2412.06559): where a chain of steps first goes wrong, from rewards of its steps.

The prediction is the first step whose value is below t, -1 (all right) if there is none. The value is sigmoid(Q_k) in
the protocol `prefix` and sigmoid(Q_k - Q_{k-1}) in `step`, Q_k as `score` has it: a sum, or a mean over tokens. F1 is
the harmonic mean of the accuracy on chains with an error and of that on chains without. t is the best of 10,000 values
on one set and is used as it is on the others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..config.run_config import RunConfig
from ..config.sections import ScoreValue
from ..data.groups import TooLong
from ..data.readers import read_rows
from ..report.markdown import escaped, grid
from ..run.atomic_files import replace_file
from ..run.jsonl import read_jsonl, read_object
from ..run.output_lock import owns_output
from .items import read_items
from .one_at_a_time import compare
from .score import SPEED, Models, score_file
from .step_scorer import value_of

Protocol = Literal["prefix", "step"]
RULES: dict[Protocol, str] = {
    "prefix": "the first step with sigmoid(Q_k) < t",
    "step": "the first step with sigmoid(Q_k - Q_{k-1}) < t",
}
THRESHOLDS = 10_000
NOTHING = -2
"""No prediction: not even that all steps are right."""
SETS = ("gsm8k", "math", "olympiadbench", "omnimath")
"""The benchmark's files, by name; the first is the one that the threshold is chosen on."""
WINDOW = 32
"""Chains between two lines of progress, at most; what an interruption costs."""
COMPARISON = "one_at_a_time.json"

# F1 in percent: a value for each of SETS, or the mean alone. Tables of arXiv 2604.13197; of the first five rows it does
# not say the protocol.
PUBLISHED: tuple[tuple[str, str, tuple[float, ...]], ...] = (
    ("EurusPRM-Stage1 (7B)", "–", (44.3, 35.6, 21.7, 23.1)),
    ("EurusPRM-Stage2 (7B)", "–", (47.3, 35.7, 21.2, 20.9)),
    ("Math-Shepherd-PRM-7B", "–", (31.5,)),
    ("Skywork-PRM-7B", "–", (42.1,)),
    ("Qwen2.5-Math-7B-PRM800K", "–", (56.5,)),
    ("implicit PRM, Qwen3-0.6B", "prefix", (23.9,)),
    ("implicit PRM, Qwen3-0.6B", "step", (25.4,)),
    ("IPVRM, Qwen3-0.6B", "prefix", (32.1,)),
    ("IPVRM, Qwen3-0.6B", "step", (39.1,)),
)


@dataclass(frozen=True)
class Chain:
    """Cumulative rewards of the steps, none where it was too long to score, and the index of the first wrong one, -1
    where all are right."""

    cumulative: list[float]
    label: int
    value: ScoreValue = "sum"
    """What `cumulative` is of the rewards of tokens."""

    def values(self, protocol: Protocol) -> np.ndarray:
        """[S] float64: what is compared with the threshold."""
        rewards = np.asarray(self.cumulative, dtype=np.float64)
        return _sigmoid(rewards if protocol == "prefix" else np.diff(rewards, prepend=0.0))


@dataclass(frozen=True)
class Figures:
    """Shares of chains whose prediction is right; F1 is 0 where one of the kinds is missing or never right. A chain
    without rewards (`unscored` of them) has no prediction and counts as not found, whichever its label."""

    set: str
    protocol: Protocol
    threshold: float
    erroneous: float
    correct: float
    f1: float
    chains: int
    unscored: int


@dataclass(frozen=True)
class Speed:
    """Chains a minute of what this command scored, and beside the plain way on `compared` chains, if any."""

    chains: int
    seconds: float
    chains_per_minute: float
    compared: int = 0
    times_plain: float | None = None
    largest_difference: float | None = None


@owns_output
def run(cfg: RunConfig) -> Path:
    """Writes `processbench.json` and `processbench.md` to `cfg.output`; returns the path of the table.

    A set that has no rewards yet, such as the benchmark's own JSON, is first scored as `score` would, with the PRM
    `cfg.model`, into a folder of its name in `cfg.output`. `--resume` goes on after the chains that are scored.
    """
    paths = _paths(cfg)
    models: Models | None = None
    sets: list[tuple[str, list[Chain]]] = []
    for key, path in paths:
        scored = path
        if not _has_rewards(path, key):
            models = models or Models(cfg)
            scored = score_file(_of_set(cfg, path), models)
        name = path.parent.name if path.stem == "scores" else path.stem
        sets.append((name, read_chains(scored, key)))
    value = _value(sets)
    rows = [
        figures(name, chains, best_threshold(sets[0][1], protocol), protocol)
        for protocol in get_args(Protocol)
        for name, chains in sets
    ]
    speed = None if models is None else _speed(cfg, paths[0][1], [cfg.output / name for name, _ in sets], models)
    cfg.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "value": value,
        "figures": [asdict(row) for row in rows],
        "speed": None if speed is None else asdict(speed),
    }
    replace_file(cfg.output / "processbench.json", json.dumps(found, indent=1) + "\n")
    table = cfg.output / "processbench.md"
    replace_file(table, _page(rows, cfg.score.name or (cfg.model.path if models else "yours"), speed, value))
    return table


def _value(sets: Sequence[tuple[str, list[Chain]]]) -> ScoreValue:
    """Of all chains with rewards; ValueError where they differ, as the threshold of one does not fit the other."""
    values = {chain.value: name for name, chains in sets for chain in chains if chain.cumulative}
    if len(values) > 1:
        raise ValueError(
            f"rewards.value must be alike in all sets, got 'sum' in {values['sum']} and 'mean' in {values['mean']}: a "
            "threshold of one does not fit the other"
        )
    return next(iter(values))


def _paths(cfg: RunConfig) -> list[tuple[str, Path]]:
    """(key, file) of each set, the one that the threshold is chosen on first."""
    own = cfg.processbench
    found = [("processbench.data", own.data / f"{name}.json") for name in SETS] if own.data is not None else []
    found = [(key, path) for key, path in found if path.is_file()]
    if own.tune is not None:
        found = [("processbench.tune", own.tune), *((key, path) for key, path in found if path != own.tune)]
    elif own.data is None:
        raise ValueError(
            "processbench.tune is required: the set on which the threshold is chosen (or processbench.data: the folder "
            "of the benchmark's own files)"
        )
    elif not found or found[0][1].stem != SETS[0]:
        raise FileNotFoundError(
            f"processbench.data: {own.data} has no {SETS[0]}.json, on which the threshold is chosen; processbench.tune "
            "names another set"
        )
    found += [("processbench.paths", path) for path in own.paths]
    names = [path.parent.name if path.stem == "scores" else path.stem for _, path in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"{found[names.index(twice)][0]}: two sets are called {twice!r}")
    return found


def _has_rewards(path: Path, key: str) -> bool:
    """Whether the file is what `score` writes: its rows have rewards, or no steps to score."""
    _, row = next(iter(read_rows(path, key)), ("", {}))
    return "rewards" in row or "steps" not in row


def _of_set(cfg: RunConfig, path: Path) -> RunConfig:
    score = cfg.score.model_copy(update={"path": path, "window": min(cfg.score.window, WINDOW)})
    return cfg.model_copy(update={"output": cfg.output / path.stem, "score": score})


def _speed(cfg: RunConfig, tuning: Path, folders: Sequence[Path], models: Models) -> Speed:
    """Of all chains that were scored, by this command or those before it that it goes on from."""
    timed = [row for folder in folders for row in read_jsonl(folder / SPEED)]
    chains, seconds = sum(row["responses"] for row in timed), sum(row["seconds"] for row in timed)
    speed = Speed(chains, seconds, 60 * chains / seconds if seconds else 0.0)
    count, place = cfg.processbench.compare, cfg.output / COMPARISON
    # The card's arithmetic has a mask of its own, and a set that came with rewards no responses to score.
    if not count or cfg.score.compat is not None or _has_rewards(tuning, "processbench.tune"):
        return speed
    if not place.is_file():
        items = list(read_items(tuning, "processbench.tune"))
        encoded = []
        for item in items[:: max(1, len(items) // count)][:count]:
            with suppress(TooLong):
                encoded.append(models.scorer.encode(item))
        if not encoded:
            return speed
        replace_file(place, json.dumps(asdict(compare(encoded, models.scorer, models.pair)), indent=1) + "\n")
    found_before = read_object(place)
    return Speed(
        chains, seconds, speed.chains_per_minute, found_before["responses"],
        found_before["plain_seconds"] / found_before["seconds"], found_before["largest_difference"],
    )  # fmt: skip


def _page(rows: Sequence[Figures], name: str, speed: Speed | None, value: ScoreValue) -> str:
    """The tables as Markdown."""
    lines = [f"Q_k is beta times the {value} of the log-ratios of a chain's tokens up to the end of step k.", ""]
    for protocol, rule in RULES.items():
        own = [row for row in rows if row.protocol == protocol]
        cells = [
            [escaped(r.set), *(f"{100 * share:.1f}" for share in (r.erroneous, r.correct, r.f1)), r.chains] for r in own
        ]
        cells.append(["mean", "", "", f"{100 * _mean_f1(own):.1f}", sum(r.chains for r in own)])
        lines += [
            f"Protocol {protocol}: {rule}; t = {own[0].threshold:.6g}, chosen on {escaped(own[0].set)}.", "",
            grid(["set", "erroneous", "correct", "F1", "chains"], cells),
        ]  # fmt: skip
    for r in rows:
        if r.unscored and r.protocol == "prefix":
            lines += [f"{r.set}: {r.unscored} of {r.chains} chains have no rewards and count as not found.", ""]
    sets = list(dict.fromkeys(row.set for row in rows))
    if set(sets) & set(SETS):
        lines += _beside_published(rows, sets, name)
    if speed is not None and speed.seconds:
        lines.append(f"Scored {speed.chains} chains in {speed.seconds:.0f} s: {speed.chains_per_minute:.0f} a minute.")
    if speed is not None and speed.compared:
        lines.append(
            f"On {speed.compared} chains of {escaped(sets[0])}, one at a time with all logits takes "
            f"{speed.times_plain:.2f} times as long; cumulative rewards differ by at most "
            f"{speed.largest_difference:.2g}."
        )
    return "\n".join(lines).rstrip() + "\n"


def _beside_published(rows: Sequence[Figures], sets: Sequence[str], name: str) -> list[str]:
    """F1 of each set; means of published rows are over the same sets where those are known."""
    cells: list[list[str]] = []
    for protocol in RULES:
        own = [row for row in rows if row.protocol == protocol]
        mean = f"{100 * _mean_f1(own):.1f}"
        cells.append([f"**{escaped(name)}**", protocol, *(f"{100 * row.f1:.1f}" for row in own), mean])
    for model, protocol_name, values in PUBLISHED:
        known = dict(zip(SETS, values, strict=True)) if len(values) == len(SETS) else {}
        shared = [known[each] for each in sets if each in known]
        mean = f"{sum(shared) / len(shared):.1f}" if shared else f"{values[0]:.1f} (four sets)"
        cells.append([model, protocol_name, *(f"{known[s]:.1f}" if s in known else "–" for s in sets), mean])
    header = ["F1", "protocol", *map(escaped, sets), "mean"]
    return [
        grid(header, cells),
        "Published rows: arXiv 2604.13197. A mean of four sets has OmniMath among them; – is what it does not say.", "",
    ]  # fmt: skip


def _mean_f1(rows: Sequence[Figures]) -> float:
    return sum(row.f1 for row in rows) / len(rows)


def read_chains(path: Path, key: str) -> list[Chain]:
    chains = []
    for place, row in read_rows(path, key):
        label = row.get("label")
        if "rewards" not in row or not isinstance(label, int) or isinstance(label, bool):
            raise ValueError(
                f"{path}, {place}: needs rewards (from `prime-trainer score`) and label, the first wrong step; a set "
                "to be scored has steps and no rewards"
            )
        cumulative = [] if row["rewards"] is None else _cumulative(row["rewards"])
        value = value_of(row["rewards"], f"{path}, {place}")
        if cumulative is None:
            raise ValueError(f"{path}, {place}: rewards.cumulative must be a list of finite numbers, one a step")
        # How many steps a chain without rewards has is not known here.
        if not -1 <= label < (len(cumulative) or math.inf):
            raise ValueError(f"{path}, {place}: label must be -1 or one of {len(cumulative)} steps, got {label}")
        chains.append(Chain(cumulative, label, value))
    if not any(chain.cumulative for chain in chains):
        raise ValueError(f"{key}: {path} has no rows{' with rewards' if chains else ''}")
    return chains


def _cumulative(rewards: Any) -> list[float] | None:
    """None where they are not there."""
    values = rewards.get("cumulative") if isinstance(rewards, dict) else None
    if not isinstance(values, list) or not values:
        return None
    return values if all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) else None


def predict(chain: Chain, thresholds: np.ndarray, protocol: Protocol = "prefix") -> np.ndarray:
    """The predicted step for every threshold; `NOTHING` for a chain without rewards."""
    if not chain.cumulative:
        return np.full(len(thresholds), NOTHING)
    # The first value below t comes where the running minimum first is; that falls, so its negative is sorted.
    lowest = -np.minimum.accumulate(chain.values(protocol))
    first = np.searchsorted(lowest, -thresholds, side="right")
    return np.where(first < len(lowest), first, -1)


def best_threshold(chains: Sequence[Chain], protocol: Protocol = "prefix") -> float:
    """The threshold of highest F1, the lowest of equals, of 10,000 evenly spaced from the lowest to the highest value
    of the steps: with a small beta all values crowd around one half, where a grid on [0, 1] would miss them."""
    values = np.concatenate([chain.values(protocol) for chain in chains])
    thresholds = np.linspace(values.min(), values.max(), THRESHOLDS)
    return float(thresholds[np.argmax(_shares(chains, thresholds, protocol)[2])])


def figures(name: str, chains: Sequence[Chain], threshold: float, protocol: Protocol = "prefix") -> Figures:
    erroneous, correct, f1 = (float(share[0]) for share in _shares(chains, np.array([threshold]), protocol))
    unscored = sum(not chain.cumulative for chain in chains)
    return Figures(name, protocol, threshold, erroneous, correct, f1, len(chains), unscored)


def _shares(
    chains: Sequence[Chain], thresholds: np.ndarray, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    right = {True: np.zeros(len(thresholds)), False: np.zeros(len(thresholds))}
    count = {True: 0, False: 0}
    for chain in chains:
        wrong = chain.label >= 0
        right[wrong] += predict(chain, thresholds, protocol) == chain.label
        count[wrong] += 1
    erroneous, correct = (right[kind] / max(1, count[kind]) for kind in (True, False))
    both = erroneous + correct
    return erroneous, correct, 2 * erroneous * correct / np.where(both > 0, both, 1.0)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(values / 2))
