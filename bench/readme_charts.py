"""The two pictures of the README, from committed results: speed.svg and learning_curve.svg.

    python bench/readme_charts.py [FOLDER]      # docs/images unless given

Text stays text in the files, so that a test can compare their numbers with the tables.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
OPS = BENCH / "results" / "ops" / "results.json"
SEEDS = BENCH / "results" / "demo" / "seeds"
BLUE, ORANGE, GREY = "#1f6fb4", "#e08a1e", "#8a8a8a"
# Name in the chart, group and our way in the results; one line for each operation.
SHOWN = (
    ("log_ratios, 3 models", "log_ratios of three models, forward", "cpu"),
    ("log_probs", "log_probs, forward", "cpu"),
    ("log_probs, forward + backward", "log_probs, forward and backward", "cpu"),
    ("linear_log_probs", "linear_log_probs, forward", "kernel"),
    ("linear_ppo_loss, forward + backward", "linear_ppo_loss, forward and backward", "kernel"),
    ("rloo_advantages", "rloo_advantages, gamma 1", "kernel"),
    ("segment_scan", "segment_scan, gamma 0.95", "kernel"),
    ("step_rewards", "step_rewards, 20 steps a response", "kernel"),
    ("prm_loss, forward + backward", "prm_loss, forward and backward", "kernel"),
    ("ppo_loss, forward + backward", "ppo_loss, forward and backward", "kernel"),
    ("unpack", "unpack", "kernel"),
)


def speedups() -> dict[str, dict[str, float]]:
    """{operation: {"eager": times as fast as eager PyTorch, "compile": as torch.compile}}, by medians."""
    medians: dict[tuple[str, str], float] = {}
    for one in json.loads(OPS.read_text())["results"]:
        medians[one["group"], one["way"]] = statistics.median(one["seconds"])
    return {
        name: {other: medians[group, other] / medians[group, ours] for other in ("eager", "compile")}
        for name, group, ours in SHOWN
    }


def curves() -> dict[str, list[tuple[int, float]]]:
    """{seed: [(step, greedy accuracy on held-out problems in %)]}."""
    found = {}
    for path in sorted(SEEDS.glob("*.metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        name = path.name.split(".")[0].replace("rl-", "seed ")
        found[name] = [(row["step"], 100 * row["greedy"]) for row in rows if row["stage"] == "eval"]
    return found


def figure(width: float, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    # Ids that do not change from run to run, and letters in place of outlines.
    matplotlib.rcParams.update({"svg.hashsalt": "prime-kernels", "svg.fonttype": "none", "font.family": "sans-serif"})
    drawn, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return pyplot, drawn, axes


def save(pyplot: Any, drawn: Any, path: Path) -> None:
    drawn.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(drawn)


def draw_speed(path: Path) -> None:
    found = speedups()
    names = list(found)[::-1]
    pyplot, drawn, axes = figure(8, 5.2)
    for other, shift, colour in (("eager", 0.2, BLUE), ("compile", -0.2, ORANGE)):
        label = "eager PyTorch" if other == "eager" else "torch.compile"
        values = [found[name][other] for name in names]
        bars = axes.barh([k + shift for k in range(len(names))], values, height=0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.1f}x" for value in values], padding=3, fontsize=9)
    axes.set_yticks(range(len(names)), names)
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 10, 30, 100], ["1", "3", "10", "30", "100"])
    axes.minorticks_off()
    axes.set_xlim(1, 200)
    axes.set_title("Speed relative to PyTorch on two CPU cores", loc="left", fontsize=11)
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.25), frameon=False)
    save(pyplot, drawn, path)


def draw_learning_curve(path: Path) -> None:
    pyplot, drawn, axes = figure(8, 3.2)
    for (name, points), colour in zip(curves().items(), (BLUE, ORANGE, GREY), strict=True):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, marker="o", label=f"{name}: {values[0]:.1f} to {values[-1]:.1f} %")
    axes.set_xlabel("PRIME step (about 40 s each on two CPU cores)")
    axes.set_ylabel("held-out accuracy, %")
    axes.set_ylim(0, 100)
    axes.set_title("SmolLM2-135M learns to show its work on sums: greedy, 200 problems", loc="left", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    save(pyplot, drawn, path)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    draw_speed(folder / "speed.svg")
    draw_learning_curve(folder / "learning_curve.svg")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else BENCH.parent / "docs" / "images")
