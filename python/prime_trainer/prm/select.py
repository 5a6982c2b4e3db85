"""Choosing among N responses by their rewards: best-of-N, weighted best-of-N, majority voting, pass@N.

A response's score is the min, mean, sum or last of its steps' rewards, which are of sums or of means of the rewards of
tokens (`rewards.value`): all files of a reward model are of one of the two. Best-of-N takes the highest score; weighted
best-of-N the answer with the largest sum of sigmoid(score) (arXiv 2408.03314, as the EurusPRM cards have it); majority
the most frequent answer. An answer is the row's `extracted_answer` or else what stands in the last \\boxed{} of the
response; equivalent answers count as one.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..config.run_config import RunConfig
from ..config.sections import ScoreValue
from ..data.readers import read_rows
from ..report.markdown import escaped, grid
from ..report.statistics import bootstrap_interval, majority, pass_at_k
from ..run.atomic_files import replace_file
from ..run.output_lock import owns_output
from ..verify import Verifier, last_boxed
from .items import items_of, outcome
from .step_scorer import RESPONSE_REWARDS, value_of


@dataclass
class Problem:
    """The responses to one prompt, in the order of the file. `groups` numbers equivalent answers, None: no answer."""

    right: list[bool]
    answers: list[str | None]
    scores: dict[str, list[float]]
    groups: list[int | None]


@dataclass(frozen=True)
class Result:
    """An accuracy over problems with its 95 % bootstrap interval."""

    benchmark: str
    reward_model: str
    method: str
    rewards: str
    """What the scores integrate: min, mean, sum or last; empty for methods without scores."""
    n: int
    accuracy: float
    low: float
    high: float
    problems: int
    value: ScoreValue = "sum"
    """What the rewards of steps are of those of tokens."""


@owns_output
def run(cfg: RunConfig) -> Path:
    """Writes `select.json` and `select.md` to `cfg.output`; returns the path of the table."""
    own = cfg.select
    if not own.paths:
        raise ValueError("select.paths is required: files that `prime-trainer score` wrote")
    found: dict[tuple[str, str], dict[str, Problem]] = {}
    values: dict[str, ScoreValue] = {}
    for path in own.paths:
        _read(path, own.step_rewards, found, values)
    with Verifier.from_config(cfg.task) as verifier:
        for problems in found.values():
            groups = verifier.group([p.answers for p in problems.values()])
            for problem, numbers in zip(problems.values(), groups, strict=True):
                problem.groups = numbers
    results = [
        result
        for (benchmark, model), problems in found.items()
        for result in compare(
            list(problems.values()), own.n, benchmark, model, own.bootstrap, cfg.seed, values.get(model, "sum")
        )
    ]
    for (benchmark, model), problems in found.items():
        said = left_out(problems, own.n)
        if said is not None:
            print(f"select: {benchmark}, {model or 'no reward model'}: {said}", file=sys.stderr)
    cfg.output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    document = {"step_rewards": own.step_rewards, "results": rows}
    replace_file(cfg.output / "select.json", json.dumps(document, indent=1) + "\n")
    table = cfg.output / "select.md"
    replace_file(table, markdown(results, own.step_rewards))
    return table


def compare(
    problems: Sequence[Problem],
    ns: Sequence[int],
    benchmark: str,
    model: str,
    resamples: int,
    seed: int,
    value: ScoreValue = "sum",
) -> Iterator[Result]:
    """Every method for every n that all problems have responses for.

    With more than n responses a problem's value is the mean over as many disjoint runs of n as there are.
    """
    fewest = min(len(p.right) for p in problems)
    for n in sorted(set(ns)):
        if n > fewest:
            continue
        columns = {("mean accuracy of one", ""): [sum(p.right) / len(p.right) for p in problems]}
        columns["pass@n", ""] = [pass_at_k(len(p.right), sum(p.right), n) for p in problems]
        columns["majority voting", ""] = [_over_runs(p, n, None, _by_votes) for p in problems]
        for method, choose in (("best-of-n", _by_score), ("weighted best-of-n", _by_votes)):
            for rewards in RESPONSE_REWARDS:
                columns[method, rewards] = [_over_runs(p, n, rewards, choose) for p in problems]
        for (method, rewards), values in columns.items():
            low, high = bootstrap_interval(values, resamples=resamples, seed=seed)
            mean = sum(values) / len(values)
            yield Result(benchmark, model, method, rewards, n, mean, low, high, len(values), value)


def left_out(problems: Mapping[str, Problem], ns: Sequence[int]) -> str | None:
    """Which n have no table, and because of which problem; None where all have one."""
    name, fewest = min(((name, len(p.right)) for name, p in problems.items()), key=lambda pair: pair[1])
    over = [str(n) for n in sorted(set(ns)) if n > fewest]
    if not over:
        return None
    return f"n = {', '.join(over)} left out: problem {name:.100} has {fewest} response{'s' if fewest > 1 else ''}"


def _over_runs(problem: Problem, n: int, rewards: str | None, choose: Any) -> float:
    runs = [range(at, at + n) for at in range(0, len(problem.right) - n + 1, n)]
    chosen = [choose(problem, members, rewards) for members in runs]
    return sum(k is not None and problem.right[k] for k in chosen) / len(runs)


def _by_score(problem: Problem, members: range, rewards: str) -> int:
    return max(members, key=lambda k: problem.scores[rewards][k])  # the first of equals


def _by_votes(problem: Problem, members: range, rewards: str | None) -> int | None:
    weights = None if rewards is None else [_sigmoid(problem.scores[rewards][k]) for k in members]
    chosen = majority([problem.groups[k] for k in members], weights)
    return None if chosen is None else members[chosen]


def _sigmoid(value: float) -> float:
    # Half of tanh's own range: exp would overflow for very low scores.
    return 0.5 * (1 + math.tanh(value / 2))


def _read(
    path: Path, mode: str, found: dict[tuple[str, str], dict[str, Problem]], values: dict[str, ScoreValue]
) -> None:
    """Adds the problems of a file to `found`, and what a reward model's rewards are of to `values`."""
    for place, row in read_rows(path, "select.paths"):
        right = outcome(row)
        if right is None:
            raise ValueError(f"{path}, {place}: label is missing: whether the response is right")
        if "rewards" not in row:
            raise ValueError(f"{path}, {place}: rewards is missing; is this a file that `prime-trainer score` wrote?")
        key = (str(row.get("benchmark") or path.stem), str(row.get("reward_model", "")))
        if row["rewards"] is not None:
            given = value_of(row["rewards"], f"{path}, {place}")
            if values.setdefault(key[1], given) != given:
                raise ValueError(
                    f"{path}, {place}: rewards.value is {given!r}, other rewards of {key[1]!r} are of "
                    f"{values[key[1]]!r}: they cannot be compared; score.name names the two apart"
                )
        name = row.get("id")
        if name is None:
            name = json.dumps(next(items_of(row, f"{path}, {place}")).messages)
        problem = found.setdefault(key, {}).setdefault(str(name), Problem([], [], {}, []))
        problem.right.append(right > 0.5)
        problem.answers.append(row["extracted_answer"] if "extracted_answer" in row else last_boxed(_text(row)))
        for rewards in RESPONSE_REWARDS:
            # A response that was too long to score is chosen last.
            value = -math.inf if row["rewards"] is None else _reward(row["rewards"], mode, rewards)
            if value is None:
                raise ValueError(
                    f"{path}, {place}: rewards.response.{mode}.{rewards} must be a finite number; is this a file that "
                    "`prime-trainer score` wrote?"
                )
            problem.scores.setdefault(rewards, []).append(value)


def _reward(rewards: Any, mode: str, name: str) -> float | None:
    """None where it is not there."""
    for key in ("response", mode, name):
        rewards = rewards.get(key) if isinstance(rewards, dict) else None
    return rewards if isinstance(rewards, (int, float)) and math.isfinite(rewards) else None


def _text(row: dict[str, Any]) -> str:
    """The response, which may be given as a chat, which it ends, or as steps."""
    response = row.get("response") or row.get("steps") or ""
    if isinstance(response, str):
        return response
    return str(response[-1].get("content")) if isinstance(response[-1], dict) else "\n\n".join(response)


def markdown(results: Sequence[Result], step_rewards: str) -> str:
    """A table for every n: method x reward model x benchmark, with the mean over the benchmarks."""
    benchmarks = list(dict.fromkeys(r.benchmark for r in results))
    lines = [
        f"Accuracy in percent with its 95 % bootstrap interval over problems; scores are taken over {step_rewards} "
        "rewards of the steps.",
    ]
    means = dict.fromkeys(escaped(r.reward_model) or "–" for r in results if r.value == "mean")
    if means:
        lines += ["", f"Rewards of {', '.join(means)} are of means over tokens, others of sums."]
    for n in sorted({r.n for r in results}):
        cells: dict[tuple[str, str, str], dict[str, Result]] = {}
        for r in results:
            if r.n == n:
                # Without scores the reward model decides nothing: one row for all.
                cells.setdefault((r.method, r.rewards, r.reward_model if r.rewards else ""), {})[r.benchmark] = r
        header = [
            "method",
            "reward model",
            "rewards",
            *map(escaped, benchmarks),
            *(["mean"] if len(benchmarks) > 1 else []),
        ]
        table: list[list[str]] = []
        for (method, rewards, model), row in cells.items():
            values = [_cell(row.get(benchmark)) for benchmark in benchmarks]
            if len(benchmarks) > 1:
                shares = [r.accuracy for r in row.values()]
                values.append(f"{100 * sum(shares) / len(shares):.1f}" if len(shares) == len(benchmarks) else "–")
            label = method.replace("-n", f"-{n}").replace("@n", f"@{n}")
            table.append([label, escaped(model) or "–", rewards or "–", *values])
        lines += ["", f"## n = {n}", "", grid(header, table).rstrip()]
    return "\n".join(lines) + "\n"


def _cell(result: Result | None) -> str:
    if result is None:
        return "–"
    return f"{100 * result.accuracy:.1f} [{100 * result.low:.1f}, {100 * result.high:.1f}]"
