"""Turns finished demo runs into committed results: table, curves, the metrics that made them, machine and versions.

usage: python bench/demo/results.py bench/results/demo/NAME RUN_DIR [RUN_DIR ...]
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from PIL import Image

from prime_trainer.plots import FIGURES, LIGHT, TIME, draw
from prime_trainer.record import read_record
from prime_trainer.report import write_report

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
        f"# {target.name}\n\n{_plain(table, runs)}\n{_setting()}\n\n![curves](curves.png)\n"
    )
    for run in runs:
        (target / f"{run.name}.metrics.jsonl").write_text((run / "metrics.jsonl").read_text())
        config = json.dumps(json.loads((run / "config.json").read_text()), indent=2)
        (target / f"{run.name}.config.json").write_text(_plain(config, runs) + "\n")


def _plain(text: str, runs: list[Path]) -> str:
    """Paths relative to where the runs were written: a reader has another disk."""
    return re.sub(re.escape(str(runs[0].resolve().parent)) + r"/?", "runs/", text)


def _setting() -> str:
    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")), "?")
    flags = next((line for line in _read("/proc/cpuinfo") if line.startswith("flags")), "")
    extras = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "reasoning-gym"))
    return (
        f"Measured with {os.cpu_count()} cores of {cpu} ({', '.join(extras)}), Python {platform.python_version()}, "
        f"{packages}, commit {commit}."
    )


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), [Path(word) for word in sys.argv[2:]])
