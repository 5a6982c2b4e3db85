"""The benchmarks' table: generates what is missing, scores every response, sets the cards' rows beside the model's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config.run_config import RunConfig
from ..config.sections import BenchmarkName
from ..data.problems import Problem
from ..report.markdown import table as markdown_table
from ..report.statistics import bootstrap_interval, majority, pass_at_k, wilson
from ..run.atomic_files import replace_file
from ..run.jsonl import jsonl_text
from ..run.output_lock import owns_output
from ..verify import Verifier
from . import benchmarks, responses
from .benchmarks import BENCHMARKS, PUBLISHED

MATH = [name for name, benchmark in BENCHMARKS.items() if benchmark.ability == "math"]


@owns_output
def run(cfg: RunConfig) -> Path:
    """Writes `table.md`, `summary.json` and a `NAME.scored.jsonl` for each benchmark; returns the table's path."""
    target = responses.generate(cfg)
    summary: dict[BenchmarkName, dict[str, Any]] = {}
    with Verifier.from_config(cfg.task) as verifier:
        for name in benchmarks.wanted(cfg.bench):
            rows = _score(cfg, name, verifier)
            replace_file(target / f"{name}.scored.jsonl", jsonl_text(rows))
            summary[name] = summarise(rows, cfg.bench.samples, BENCHMARKS[name].ability, cfg.seed)
            print(f"{BENCHMARKS[name].title}: {_shares(summary[name])}", flush=True)
    replace_file(target / "summary.json", json.dumps(summary, indent=1) + "\n")
    table = target / "table.md"
    replace_file(table, render(summary, Path(cfg.model.path).name, cfg.bench.limit))
    return table


def _score(cfg: RunConfig, name: BenchmarkName, verifier: Verifier) -> list[dict[str, Any]]:
    """Every response that the configuration asks for, with its score; mathematical answers of an item in groups."""
    sampled = responses.read(cfg, name)
    modes = [(responses.GREEDY, 0)] * cfg.bench.greedy + [(responses.SAMPLED, k) for k in range(cfg.bench.samples)]
    jobs: list[tuple[Problem, dict[str, Any]]] = [
        (problem, sampled[problem.id, mode, index])
        for problem in benchmarks.load(name, cfg.bench)
        for mode, index in modes
    ]
    verdicts = verifier.score([(problem.answer, row["response"]) for problem, row in jobs])
    rows = []
    for (problem, row), verdict in zip(jobs, verdicts, strict=True):
        answer = verifier.answer(problem.answer, row["response"])
        rows.append(row | {
            "reference": problem.reference, "answer": answer, "score": verdict.score, "failure": verdict.failure,
        })  # fmt: skip
    if BENCHMARKS[name].ability == "math" and cfg.bench.samples > 1:
        by_item = _by_item(rows, responses.SAMPLED)
        grouped = verifier.group([[row["answer"] for row in item] for item in by_item])
        for item, groups in zip(by_item, grouped, strict=True):
            for row, group in zip(item, groups, strict=True):
                row["group"] = group
    return rows


def _by_item(rows: Sequence[dict[str, Any]], mode: str) -> list[list[dict[str, Any]]]:
    items: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["mode"] == mode:
            items.setdefault(row["id"], []).append(row)
    return list(items.values())


def summarise(rows: Sequence[dict[str, Any]], samples: int, ability: str, seed: int) -> dict[str, Any]:
    """Figures of one benchmark: each `[share, low, high]`, the bounds of 95 % intervals.

    `greedy` has Wilson's interval. `avg@k`, `maj@k` (mathematics) and `pass@k` have bootstrap intervals over items.
    """
    found: dict[str, Any] = {}
    greedy, items = [r["score"] for r in rows if r["mode"] == responses.GREEDY], _by_item(rows, responses.SAMPLED)
    if greedy:
        share = sum(greedy) / len(greedy)
        found["greedy"] = [share, *wilson(share, len(greedy))]
    if items:
        means = [float(np.mean([row["score"] for row in item])) for item in items]
        solved = [pass_at_k(samples, sum(row["score"] == 1.0 for row in item), samples) for item in items]
        figures = {"avg": means, "pass": solved}
        if ability == "math" and samples > 1:
            chosen = [majority([row["group"] for row in item]) for item in items]
            voted = [0.0 if k is None else item[k]["score"] for k, item in zip(chosen, items, strict=True)]
            figures = {"avg": means, "maj": voted, "pass": solved}
        for label, values in figures.items():
            found[f"{label}@{samples}"] = [float(np.mean(values)), *bootstrap_interval(values, seed=seed)]
    count = max(1, len(rows))
    return found | {
        "items": len({row["id"] for row in rows}),
        "answered": sum(row["answer"] is not None for row in rows) / count,
        "truncated": sum(row["finish_reason"] == "length" for row in rows) / count,
        "tokens": sum(row["tokens"] for row in rows) / count,
        "failures": sum(row["failure"] is not None for row in rows),
    }


def _shares(figures: dict[str, Any]) -> str:
    shown = [f"{label} {_interval(value)}" for label, value in figures.items() if isinstance(value, list)]
    return ", ".join([*shown, f"{figures['items']} items"])


def _interval(value: Sequence[float]) -> str:
    share, low, high = (100 * v for v in value)
    return f"{share:.1f} [{low:.1f}, {high:.1f}]"


def render(summary: dict[BenchmarkName, dict[str, Any]], model: str, limit: int) -> str:
    """Two Markdown tables: accuracies in the cards' order, and each benchmark's figures with their intervals."""
    headers = ["model", *(BENCHMARKS[name].title for name in MATH), "mean of the five"]
    headers += [BENCHMARKS[name].title for name in BENCHMARKS if name not in MATH]
    shares = {name: figures[_main(figures)][0] * 100 for name, figures in summary.items() if _main(figures)}
    label = model + (f", first {limit} items of each" if limit else "")
    rows = [_row(headers, f"{name} (published)", values) for name, values in PUBLISHED.items()]
    rows.append(_row(headers, label, shares))
    labels = list(dict.fromkeys(k for f in summary.values() for k, v in f.items() if isinstance(v, list)))
    details = [
        {
            "benchmark": BENCHMARKS[name].title,
            "items": figures["items"],
            **{label: _interval(figures[label]) if label in figures else "–" for label in labels},
            "with an answer": f"{100 * figures['answered']:.0f} %",
            "cut off": f"{100 * figures['truncated']:.0f} %",
            "mean tokens": f"{figures['tokens']:.0f}",
            "failures": figures["failures"],
        }
        for name, figures in summary.items()
    ]
    first = next((main for figures in summary.values() if (main := _main(figures))), "")
    return (
        f"Accuracy in % ({first}):\n\n{markdown_table(rows)}\n"
        "In % with 95 % intervals (greedy: Wilson; the others: bootstrap over items). Failures are time-outs and "
        f"answers that could not be compared; they score 0.\n\n{markdown_table(details)}"
    )


def _main(figures: dict[str, Any]) -> str:
    return next((label for label, value in figures.items() if isinstance(value, list)), "")


def _row(headers: Sequence[str], label: str, values: dict[BenchmarkName, float]) -> dict[str, str]:
    cells = {BENCHMARKS[name].title: f"{value:.1f}" for name, value in values.items()}
    if all(name in values for name in MATH):
        cells["mean of the five"] = f"{sum(values[name] for name in MATH) / len(MATH):.1f}"
    return {header: label if header == "model" else cells.get(header, "–") for header in headers}
