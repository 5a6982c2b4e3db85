"""Turns finished runs of run.sh into the files under bench/results/prm: tables, a figure, pages and their pictures.

python bench/prm/results.py OUTPUT "0 1" bench/results/prm
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from first_wrong_step import locate

import prime_kernels as pk
from prime_trainer.config.run_config import RunConfig
from prime_trainer.prm.page import render
from prime_trainer.prm.select import run as select
from prime_trainer.report.plots import LIGHT
from prime_trainer.report.statistics import auc, wilson
from prime_trainer.run.jsonl import jsonl_rows
from prime_trainer.run.provenance import environment

N = 16
EXPLAINED = {"best_fixed_place": "best fixed place (0 is the first step, -1 the last, -2 the second to last)"}
PAGE_RESPONSES = 48


def ranking(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Pair accuracy and AUC of the summed rewards, of all responses and of the worked ones alone (several steps)."""
    out = {}
    for name, kept in (("", rows), ("_worked", [r for r in rows if len(r["rewards"]["steps"]) > 1])):
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in kept:
            groups.setdefault(row["id"], []).append(row)
        ordered = [row for group in groups.values() for row in group]
        scores = torch.tensor([row["rewards"]["cumulative"][-1] for row in ordered])
        right = torch.tensor([float(row["label"]) for row in ordered])
        ones = torch.arange(len(ordered) + 1)
        cu_groups = torch.tensor([0, *(len(g) for g in groups.values())]).cumsum(0)
        found = pk.prm_loss(scores, right, ones, cu_groups=cu_groups)
        out |= {f"pair_accuracy{name}": found.pair_accuracy.item(), f"auc{name}": auc(scores, right > 0.5)}
    return out


def length_bias(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Over pairs of a right and a wrong worked response to one problem: how often the right one has the higher sum of
    rewards, the higher mean over tokens, more tokens (ties a half)."""
    scores = {
        "sum": lambda row: row["rewards"]["cumulative"][-1],
        "mean_over_tokens": lambda row: row["rewards"]["cumulative"][-1] / len(row["rewards"]["tokens"]),
        "tokens_alone": lambda row: len(row["rewards"]["tokens"]),
    }
    pairs = [
        (a, b)
        for a, b in itertools.product([r for r in rows if len(r["rewards"]["steps"]) > 1], repeat=2)
        if a["id"] == b["id"] and a["label"] > 0.5 >= b["label"]
    ]
    out = {"worked_pairs": float(len(pairs))}
    for name, score in scores.items():
        wins = [0.5 * (1 + (score(a) > score(b)) - (score(a) < score(b))) for a, b in pairs]
        out[f"worked_pairs_by_{name}"] = sum(wins) / len(wins)
    return out


def summary(rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> dict[str, Any]:
    def accuracy(method: str, rewards: str = "") -> float:
        (one,) = [r for r in results if (r["method"], r["rewards"], r["n"]) == (method, rewards, N)]
        return one["accuracy"]

    return {
        "mean accuracy of one": accuracy("mean accuracy of one"),
        "best-of-16": accuracy("best-of-n", "sum"),
        "majority voting": accuracy("majority voting"),
        "weighted best-of-16": accuracy("weighted best-of-n", "sum"),
        "pass@16": accuracy("pass@n"),
        **ranking(rows),
        **length_bias(rows),
        **locate(rows),
    }


def floors(found: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """(floor, what was measured, held)."""
    gain = found["best-of-16"] - found["mean accuracy of one"]
    low, _ = wilson(found["lowest_on_first_wrong"], found["responses"])
    return [
        ("pair accuracy above 0.70", f"{found['pair_accuracy']:.3f}", found["pair_accuracy"] > 0.7),
        ("best-of-16 at least 8 points above one response", f"{100 * gain:+.1f} points", gain >= 0.08),
        (
            "weighted best-of-16 at least majority voting",
            f"{100 * found['weighted best-of-16']:.1f} and {100 * found['majority voting']:.1f} %",
            found["weighted best-of-16"] >= found["majority voting"],
        ),
        (
            "lowest step reward on the first wrong step, above chance",
            f"{100 * found['lowest_on_first_wrong']:.1f} % of {found['responses']} [from {100 * low:.1f}], chance "
            f"{100 * found['chance']:.1f} %, best fixed place {100 * found['best_fixed_place_share']:.1f} %",
            low > found["chance"],
        ),
    ]


def figures(found: dict[str, dict[str, Any]]) -> list[str]:
    """The lines of a table of all that was measured, a column for each seed."""
    names = list(next(iter(found.values())))
    lines = [f"| figure | {' | '.join(f'seed {s}' for s in found)} |", "| --- |" + " --- |" * len(found)]
    for name in names:
        values = " | ".join(f"{one[name]:.4g}" for one in found.values())
        lines.append(f"| {EXPLAINED.get(name, name.replace('_', ' '))} | {values} |")
    return lines


def figure(results: list[dict[str, Any]], path: Path) -> None:
    """Accuracy by number of responses, the mean over the runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [("pass@n", ""), ("weighted best-of-n", "sum"), ("best-of-n", "sum"), ("best-of-n", "min"),
             ("majority voting", ""), ("mean accuracy of one", "")]  # fmt: skip
    axes = pyplot.figure(figsize=(8, 4.5), layout="constrained").add_subplot()
    for (method, rewards), colour in zip(shown, LIGHT.colours, strict=True):
        points: dict[int, list[float]] = {}
        for r in results:
            if (r["method"], r["rewards"]) == (method, rewards):
                points.setdefault(r["n"], []).append(100 * r["accuracy"])
        ns = sorted(points)
        label = f"{method} ({rewards})" if rewards else method
        axes.plot(ns, [sum(points[n]) / len(points[n]) for n in ns], marker="o", color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ns, [str(n) for n in ns])
    axes.set_xlabel("responses n")
    axes.set_ylabel("accuracy, %")
    axes.grid(color=LIGHT.grid)
    axes.legend()
    axes.figure.savefig(path, dpi=120)


def pick(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For the page: worked responses, each text once, wrong and right ones in turn."""
    worked = {(row["id"], row["response"]): row for row in rows if len(row["rewards"]["steps"]) > 1}.values()
    kinds = [[row for row in worked if (row["label"] > 0.5) == right] for right in (False, True)]
    return [row for pair in zip(*kinds, strict=False) for row in pair][:PAGE_RESPONSES]


def picture(page: Path, path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        print("no chromium: the page's picture is not made", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1300",
             f"--user-data-dir={profile}", f"--screenshot={path}", f"{page.resolve().as_uri()}#incorrect"],
            check=True, capture_output=True, timeout=120,
        )  # fmt: skip


def main(output: Path, seeds: list[str], target: Path) -> None:
    made_on = environment()  # before anything is written: the commit is marked where files have changed
    target.mkdir(parents=True, exist_ok=True)
    paths = [output / seed / "scores" / "scores.jsonl" for seed in seeds]
    select(RunConfig(output=target, select={"paths": paths, "n": [1, 2, 4, 8, 16]}))
    results = json.loads((target / "select.json").read_text())["results"]
    found, curves = {}, {}
    for seed, path in zip(seeds, paths, strict=True):
        rows = [row for _, row in jsonl_rows(path)]
        found[seed] = summary(rows, [r for r in results if r["benchmark"] == rows[0]["benchmark"]])
        curves[seed] = [row for _, row in jsonl_rows(output / seed / "prm" / "metrics.jsonl")]
        page = target / f"page-{seed}.html"
        page.write_text(render(pick(rows), f"Sums, seed {seed}"), encoding="utf-8")
        picture(page, target / f"page-{seed}.png")
    figure(results, target / "select.png")
    document = {"environment": made_on, "seeds": found, "training": curves}
    (target / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = []
    for seed in seeds:
        lines += [f"| floor | seed {seed} | held |", "| --- | --- | --- |"]
        lines += [f"| {name} | {value} | {'yes' if held else 'no'} |" for name, value, held in floors(found[seed])]
        lines.append("")
    lines += figures(found)
    (target / "floors.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(), Path(sys.argv[3]))
