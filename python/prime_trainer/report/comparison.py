"""Runs that differ in more than their seed: arms, what each reached, and paired differences between them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .plots import mean_of
from .run_record import Record
from .statistics import t_interval

# What names, places or reads a run and does not change its training.
_NO_DIFFERENCE = ("seed", "output", "resume", "wait_lock", "rollout.server")
# Characters of an arm's name, above which its runs' folders name it: the settings have a table of their own.
_LONG_NAME = 60
_NO_TRAINING = ("bench", "checkpoint", "metrics", "processbench", "score", "select", "train_prm")


@dataclass(frozen=True)
class Arm:
    """Runs of equal settings; `settings` are those in which the arms differ."""

    name: str
    settings: dict[str, Any]
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Comparison:
    arms: tuple[Arm, ...]
    unstated: tuple[str, ...]
    """Settings that only some runs state, which are not compared."""

    @property
    def horizon(self) -> int:
        """The last step that all runs have: nothing after it is compared."""
        return min(max(record.metrics.get("rl") or [0]) for arm in self.arms for record in arm.records)

    @property
    def window(self) -> int:
        """Steps that a final value is the mean of: a tenth of all."""
        return max(1, self.horizon // 10)


def settings_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings that decide how a run trains, by dotted key."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        key = prefix + name
        if key in _NO_DIFFERENCE or key in _NO_TRAINING:
            continue
        if isinstance(value, Mapping) and value:
            found |= settings_of(value, f"{key}.")
        else:
            found[key] = value
    return found


def arms_of(records: Sequence[Record]) -> Comparison:
    """Groups runs by their settings, in the order of first appearance. The seed is no setting, nor is a path that goes
    with it (each seed's own warm-up)."""
    settings = [settings_of(record.config) for record in records]
    stated = set.intersection(*map(set, settings))
    unstated = sorted(set.union(*map(set, settings)) - stated)
    differing = [
        key
        for key in settings[0]
        if key in stated
        and len({_text(each[key]) for each in settings}) > 1
        and not _of_the_seed(key, records, settings)
    ]
    members: dict[tuple[str, ...], list[int]] = {}
    for k, each in enumerate(settings):
        members.setdefault(tuple(_text(each[key]) for key in differing), []).append(k)
    own = [{key: settings[ks[0]][key] for key in differing} for ks in members.values()]
    theirs = [tuple(records[k] for k in ks) for ks in members.values()]
    names = _names(own)
    if max(map(len, names), default=0) > _LONG_NAME:
        names = _by_folder(theirs) or names
    arms = tuple(Arm(name, found, each) for name, found, each in zip(names, own, theirs, strict=True))
    return Comparison(arms, tuple(unstated))


def _by_folder(arms: Sequence[Sequence[Record]]) -> list[str] | None:
    """Each arm's NAME where its runs are in folders NAME-SEED and no other arm's are."""
    names = [{record.path.name.rpartition("-")[0] for record in records} for records in arms]
    single = [next(iter(each)) for each in names if len(each) == 1]
    return single if len(set(single)) == len(arms) and all(single) else None


def _of_the_seed(key: str, records: Sequence[Record], settings: Sequence[Mapping[str, Any]]) -> bool:
    if not isinstance(settings[0][key], str) or "/" not in settings[0][key]:
        return False
    seeds: dict[Any, set[str]] = {}
    for record, each in zip(records, settings, strict=True):
        seeds.setdefault(record.setting("seed"), set()).add(_text(each[key]))
    return len(seeds) > 1 and all(len(values) == 1 for values in seeds.values())


def _names(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each arm by its settings; where more than two differ, by those in which it leaves what most arms have."""
    keys = list(arms[0]) if arms else []
    short = {key: key.rpartition(".")[2] for key in keys}
    last = Counter(short.values())
    usual = {key: Counter(_text(arm[key]) for arm in arms).most_common(1)[0][0] for key in keys}
    names = []
    for arm in arms:
        told = [key for key in keys if len(keys) <= 2 or _text(arm[key]) != usual[key]]
        words = [f"{short[key] if last[short[key]] == 1 else key} {shown(arm[key])}" for key in told]
        names.append(", ".join(words) or ("base" if keys else "all runs"))
    return names


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def shown(value: Any) -> str:
    """A setting's value as tables have it."""
    if isinstance(value, bool) or not isinstance(value, float):
        return value if isinstance(value, str) else _text(value)
    return f"{value:g}"


@dataclass(frozen=True)
class Measure:
    """A figure of a run: `key` of `stage`, its last value, or its mean over all steps or over the last tenth."""

    name: str
    stage: str
    key: str
    over: str
    share: bool = True

    @property
    def title(self) -> str:
        return f"{self.name} (%)" if self.share else self.name


MEASURES = (
    Measure("held-out accuracy", "eval", "greedy", "last"),
    Measure("final reward", "rl", "reward", "tenth"),
    Measure("mean reward over all steps", "rl", "reward", "all"),
    Measure("final PRM pair accuracy", "rl", "prm_pair_accuracy", "tenth"),
    Measure("final response length", "rl", "response_length", "tenth", share=False),
    Measure("seconds a step", "rl", "time/total", "all", share=False),
)


def value_of(measure: Measure, record: Record, found: Comparison) -> float | None:
    """None where the run logged nothing of it."""
    steps, values = record.series(measure.stage, measure.key)
    values = [value for step, value in zip(steps, values, strict=True) if step <= found.horizon]
    if not values:
        return None
    kept = {"last": values[-1:], "tenth": values[-found.window :], "all": values}[measure.over]
    return sum(kept) / len(kept)


def by_seed(measure: Measure, arm: Arm, found: Comparison) -> dict[Any, float]:
    """A value for each seed that has one; runs of the same seed are averaged."""
    values: dict[Any, list[float]] = {}
    for record in arm.records:
        value = value_of(measure, record, found)
        if value is not None:
            seed = record.setting("seed")
            values.setdefault(record.path.name if seed is None else seed, []).append(value)
    return {seed: sum(own) / len(own) for seed, own in values.items()}


def arm_rows(found: Comparison) -> list[dict[str, str]]:
    """A row an arm: the means of all measures with their 95 % intervals over seeds."""
    rows = []
    for arm in found.arms:
        row = {"arm": arm.name, "runs": str(len(arm.records))}
        for measure in MEASURES:
            values = list(by_seed(measure, arm, found).values())
            row[measure.title] = interval(values, measure.share)
        rows.append(row)
    return _without_empty(rows)


def difference_rows(found: Comparison) -> list[dict[str, str]]:
    """A row for every arm but the first: its paired differences from the first, over the seeds that both have."""
    base, rows = found.arms[0], []
    for arm in found.arms[1:]:
        row = {"arm": f"{arm.name} minus {base.name}", "seeds": "0"}
        for measure in MEASURES:
            one, other = (by_seed(measure, each, found) for each in (arm, base))
            shared = [seed for seed in one if seed in other]
            row["seeds"] = str(max(int(row["seeds"]), len(shared)))
            row[measure.title] = interval([one[s] - other[s] for s in shared], measure.share, signed=True)
        rows.append(row)
    return _without_empty(rows)


def reach_rows(found: Comparison) -> list[dict[str, str]]:
    """When each arm first reaches the final reward of another; the first arm is one of each pair."""
    base, rows = found.arms[0], []
    pairs = [pair for arm in found.arms[1:] for pair in ((arm, base), (base, arm))]
    for arm, other in pairs:
        target = _trailing(_reward(other, found)[1], found.window)[-1:]
        steps, values = _reward(arm, found)
        if not target or not steps:
            continue
        reached = [k for k, value in enumerate(_trailing(values, found.window)) if value >= target[0]]
        row = {"arm": arm.name, "reaches": f"{100 * target[0]:.1f} %, the final reward of {other.name}"}
        if reached:
            seconds = _seconds(arm, steps[reached[0]])
            whole = _seconds(other, found.horizon)
            row["step"] = f"{steps[reached[0]]} ({100 * steps[reached[0]] / found.horizon:.0f} %)"
            row["seconds"] = f"{seconds:.0f} ({100 * seconds / whole:.0f} %)" if whole else "–"
        else:
            row["step"] = row["seconds"] = "not reached"
        rows.append(row)
    return rows


def _reward(arm: Arm, found: Comparison) -> tuple[list[int], list[float]]:
    """The mean over the arm's runs at the steps that all of them have."""
    steps, values = mean_of([record.series("rl", "reward") for record in arm.records])
    kept = sum(step <= found.horizon for step in steps)
    return steps[:kept], values[:kept]


def _trailing(values: Sequence[float], window: int) -> list[float]:
    spans = [values[max(0, k + 1 - window) : k + 1] for k in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _seconds(arm: Arm, until: int) -> float:
    """Of training, the mean over the arm's runs."""
    totals = [
        sum(value for step, value in zip(*record.series("rl", "time/total"), strict=True) if step <= until)
        for record in arm.records
    ]
    return sum(totals) / len(totals)


def interval(values: Sequence[float], share: bool, *, signed: bool = False) -> str:
    """`43.2 [40.1, 46.3]`, in percent for shares; without brackets for a single value, a dash for none."""
    if not values:
        return "–"
    factor, form = (100, "+.1f" if signed else ".1f") if share else (1, "+.3g" if signed else ".3g")
    mean, low, high = (factor * bound for bound in t_interval(values))
    if math.isnan(low):
        return f"{mean:{form}}"
    return f"{mean:{form}} [{low:{form}}, {high:{form}}]"


def _without_empty(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the columns that have no value in any row."""
    kept = [key for key in rows[0] if any(row[key] != "–" for row in rows)] if rows else []
    return [{key: row[key] for key in kept} for row in rows]
