"""Turns finished demo runs into committed results: table, curves, the metrics that made them, machine and versions.

usage: python bench/demo/results.py bench/results/demo/NAME RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

from PIL import Image

from prime_trainer.report.page import write_report
from prime_trainer.report.plots import FIGURES, LIGHT, TIME, draw
from prime_trainer.report.run_record import read_record

CURVES = ("accuracy", "reward", "prm_pair_accuracy", "response_length", "prm_loss", "time")


def main(target: Path, runs: list[Path]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    records = [read_record(run) for run in runs]
    by_name = {figure.name: figure for figure in (*FIGURES, TIME)}
    images = [Image.open(io.BytesIO(draw(by_name[name], records, LIGHT, titled=True))) for name in CURVES]
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, height * (len(images) // 2)), "white")
    for i, image in enumerate(images):
        grid.paste(image, (i % 2 * width, i // 2 * height))
    grid.resize((grid.width * 2 // 3, grid.height * 2 // 3), Image.LANCZOS).save(target / "curves.png", optimize=True)
    table = (write_report(runs[0], runs[1:]).parent / "summary.md").read_text()
    (target / "README.md").write_text(
        f"# {target.name}\n\n{_plain(table, runs)}\n{_settings(runs)}\n\n![curves](curves.png)\n"
    )
    for run in runs:
        (target / f"{run.name}.metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
        config = json.dumps(json.loads((run / "config.json").read_text()), indent=2)
        (target / f"{run.name}.config.json").write_text(_plain(config, runs) + "\n")


def _plain(text: str, runs: list[Path]) -> str:
    """Paths relative to where the runs were written: a reader has another disk."""
    return re.sub(re.escape(str(runs[0].resolve().parent)) + r"/?", "runs/", text)


def _settings(runs: list[Path]) -> str:
    """Where the runs were made, as each of them wrote it down: one line if they agree."""
    lines = dict.fromkeys(_setting(json.loads((run / "environment.json").read_text())) for run in runs)
    return "\n\n".join(lines)


def _setting(environment: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return (
        f"Measured with {environment['cores']} cores of {environment['processor']} "
        f"({', '.join(environment['vector_sets'])}), Python {environment['python']}, {packages}, "
        f"commit {environment['commit']}."
    )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
