"""The command line, and what it leaves: a table on the terminal, JSON, a picture, and a tuning file."""

import argparse
import dataclasses
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

import prime_kernels as pk
from prime_kernels import _tuning
from prime_kernels._bench import report, tiles, timing
from prime_kernels._bench.cases import Sizes, backends
from prime_kernels._bench.report import Row
from prime_kernels._bench.run import Run
from prime_kernels._dispatch import OPERATIONS

# Rows, vocabulary, width, packed tokens, by device: from what a small batch has to what fills the device.
LEVELS = {
    "cpu": [Sizes(64, 49152, 576, 2**14), Sizes(256, 49152, 576, 2**17), Sizes(1024, 49152, 576, 2**20)],
    "cuda": [
        Sizes(1024, 131072, 4096, 2**16),
        Sizes(8192, 131072, 4096, 2**20),
        Sizes(32768, 131072, 4096, 2**22),
    ],
}
COPIED = {"cpu": 2**26, "cuda": 2**30}
SIDE = {"cpu": 1024, "cuda": 8192}
# Of the time for everything, what tiles may take.
SHARE_OF_TILES = 0.1


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    made = argparse.ArgumentParser(prog="python -m prime_kernels bench", description=__doc__)
    made.add_argument(
        "--minutes", type=float, default=3.0, help="time for everything (3); a torch.compile that has begun is finished"
    )
    made.add_argument("--output", type=Path, default=Path("prime_kernels_bench"), help="folder of what is written")
    made.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one, else cpu")
    made.add_argument("--ops", nargs="+", metavar="OP", choices=sorted(OPERATIONS), help="these operations alone")
    made.add_argument("--tokens", type=int, nargs="+", help="rows of logits, a number for each size")
    made.add_argument("--vocabulary", type=int, help="columns of logits")
    made.add_argument("--width", type=int, help="of hidden states")
    return made


def main(words: Sequence[str]) -> int:
    """Measure, print and write. The exit status is 1 if a kernel of this package failed."""
    options = parser().parse_args(words)
    if not 0 < options.minutes < 1e4:
        parser().error(f"--minutes: expected a positive number, got {options.minutes}")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        parser().error("--device: torch sees no CUDA device")
    device = torch.device(name)
    levels = _levels(options, name)
    start = time.perf_counter()
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser().error(f"--output: expected a folder that can be written, got {error}")
    if os.environ.get(_tuning.ENVIRONMENT_VARIABLE):
        _say(0.0, f"{_tuning.ENVIRONMENT_VARIABLE} is not used here: the built-in defaults are measured")
    with _tuning.trial(_tuning.none(name)):
        return _measured(options, device, levels, start)


def _measured(options: argparse.Namespace, device: torch.device, levels: list[Sizes], start: float) -> int:
    name, seconds = device.type, 60 * options.minutes
    _say(0.0, f"{_tuning.device_name(name)}: rates of a copy and of a matrix product")
    small = levels[-1].tokens * levels[-1].vocabulary < 2**20
    rates = timing.ceiling(
        device, 2**16 if small else COPIED[name], 64 if small else SIDE[name], min(6.0, 0.1 * seconds)
    )
    # What takes longest comes last.
    ops = sorted(options.ops or OPERATIONS, key=lambda op: (op.startswith("linear"), op.startswith("log"), op))
    left = seconds * (1 - SHARE_OF_TILES) - (time.perf_counter() - start)
    run = Run(device, rates, levels, ops, left)
    stopped = passed_over = False
    try:
        for row in run.measure():
            if row.failure != report.NO_TIME:
                _say(time.perf_counter() - start, _progress(row))
            elif not passed_over:
                _say(
                    time.perf_counter() - start, f"{row.op}, {row.size}: no time was left, as for others not named here"
                )
            passed_over |= row.failure == report.NO_TIME
            _write(options.output, run, {})
    except KeyboardInterrupt:
        stopped = True
    chosen: dict[str, int] = {}
    if not stopped and backends(device):
        with suppress(KeyboardInterrupt):  # what was measured before is whole without it
            chosen = tiles.best(device, rates.dtype, levels[-1], start + seconds - time.perf_counter())
    _finish(options.output, run, chosen, stopped)
    return 1 if any(row.ours and row.failure and row.failure != report.NO_TIME for row in run.rows) else 0


def _levels(options: argparse.Namespace, name: str) -> list[Sizes]:
    levels = LEVELS[name]
    for option in ("vocabulary", "width"):
        value = getattr(options, option)
        if value is not None and value < 1:
            parser().error(f"--{option}: expected a positive number, got {value}")
        if value is not None:
            levels = [each._replace(**{option: value}) for each in levels]
    if options.tokens:
        if min(options.tokens) < 1:
            parser().error(f"--tokens: expected positive numbers, got {min(options.tokens)}")
        levels = [levels[0]._replace(tokens=tokens, packed=16 * tokens) for tokens in sorted(options.tokens)]
    return levels


def _progress(row: Row) -> str:
    said = row.failure if row.seconds is None else f"{row.seconds * 1e3:.3g} ms"
    return f"{row.op}, {row.which}, {row.size}, {row.way}: {said}"


def _say(seconds: float, words: str) -> None:
    print(f"[{seconds:4.0f} s] {words}", file=sys.stderr, flush=True)


def results(run: Run, chosen: dict[str, int]) -> dict[str, Any]:
    """What is written as JSON."""
    device = run.device.type
    return {
        "device": _tuning.device_name(device),
        "device_type": device,
        "python": platform.python_version(),
        "versions": _tuning.versions(),
        "backends": pk.available_backends(),
        "copy_bytes_per_second": run.rates.copy,
        "product_flops_per_second": run.rates.product,
        "dtype": str(run.rates.dtype).removeprefix("torch."),
        "seconds": run.elapsed(),
        "verdicts": report.verdicts(run.rows),
        "tiles": chosen,
        "rows": [dataclasses.asdict(row) for row in run.rows],
    }


def _write(folder: Path, run: Run, chosen: dict[str, int]) -> None:
    partial = folder / "bench.json.partial"
    partial.write_text(json.dumps(results(run, chosen), indent=1) + "\n", encoding="utf-8")
    partial.replace(folder / "bench.json")


def _finish(folder: Path, run: Run, chosen: dict[str, int], stopped: bool) -> None:
    _write(folder, run, chosen)
    name = run.device.type
    text = report.table(run.rows)
    print(text)
    print()
    for what, verdict in report.verdicts(run.rows).items():
        print(f"{what}: {verdict}")
    device, dtype = _tuning.device_name(name), str(run.rates.dtype).removeprefix("torch.")
    rates = f"copy {run.rates.copy / 1e9:.3g} GB/s, {dtype} product {run.rates.product / 1e12:.3g} TFLOP/s"
    print(f"\n{device}: {rates}; {dtype} logits. Error: the largest against float64 relative to the largest value,")
    print("at the smallest size. Of ceiling: the least work at these rates over the time; in a cache it can exceed 1.")
    missing = report.unmeasured(run.rows)
    if missing:
        print(missing)
    why = report.picture(run.rows, f"{device}: {rates}", folder / "bench.png")
    written = ["bench.json"] + ([] if why else ["bench.png"])
    if why:
        print(why)
    found = report.best_backends(run.rows)
    if found and not stopped:
        tuning = _tuning.Tuning(name, _tuning.device_name(name), _tuning.versions(), found, chosen)
        (folder / "tuning.json").write_text(tuning.written(), encoding="utf-8")
        written.append("tuning.json")
    print(f"{folder}: {', '.join(written)}")
    if "tuning.json" in written:
        print(f"{_tuning.ENVIRONMENT_VARIABLE}={folder / 'tuning.json'} makes what was fastest here the default")
