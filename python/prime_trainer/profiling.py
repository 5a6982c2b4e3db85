"""`prime-trainer profile`: where the time of one step goes, by torch.profiler, with our stages and operations named."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import prime_kernels as pk

from . import loop
from .config.run_config import RunConfig
from .report.markdown import grid
from .run.atomic_files import replace_file

ROWS = 10
_OPERATIONS = "prime_kernels."


def run(cfg: RunConfig) -> Path:
    """Takes one step to warm up and one under the profiler; returns the page with the stages and the largest rows.

    Writes `profile/trace.json` (for chrome://tracing or ui.perfetto.dev) and `profile/README.md` into `cfg.output` and
    nothing else: no checkpoint, no metrics, no model.
    """
    trainer = loop.Run(cfg)
    try:
        trainer.train_step()
        activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with named_operations(), profile(activities=activities) as recorded:
            result = trainer.train_step()
    finally:
        trainer.close()
    folder = cfg.output / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(folder / "trace.json"))
    page = folder / "README.md"
    replace_file(page, _page(recorded, result.metrics, folder / "trace.json"))
    return page


@contextmanager
def named_operations() -> Iterator[None]:
    """Operations of prime_kernels show up under their own names; elsewhere recording would cost every call a little."""
    functions = {name: getattr(pk, name) for name in pk.__all__ if inspect.isfunction(getattr(pk, name))}
    try:
        for name, function in functions.items():
            setattr(pk, name, _recorded(_OPERATIONS + name, function))
        yield
    finally:
        for name, function in functions.items():
            setattr(pk, name, function)


def _recorded(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return call


def _page(recorded: profile, metrics: dict[str, float], trace: Path) -> str:
    total = metrics["time/total"]
    stages = [
        [key.removeprefix("time/"), f"{seconds:.3f}", f"{seconds / total:.0%}"]
        for key, seconds in metrics.items()
        if key.startswith("time/")
    ]
    on_gpu = any(event.self_device_time_total > 0 for event in recorded.key_averages())
    where = "device" if on_gpu else "cpu"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, f"self_{where}_time_total"))
    ours = [event for event in events if event.key.startswith(_OPERATIONS)]
    titles = ["row", "calls", f"self {where} ms", f"total {where} ms"]

    def row(event: Any) -> list[str]:
        own, whole = (getattr(event, f"{part}{where}_time_total") / 1000 for part in ("self_", ""))
        return [event.key[:80], str(event.count), f"{own:.2f}", f"{whole:.2f}"]

    return "\n".join(
        [
            f"One step, {total:.3f} s under the profiler, on {_device(on_gpu)}.\n",
            grid(["stage", "s", "share"], stages, numbers=True),
            f"\nThe {ROWS} rows with the most time of their own:\n",
            grid(titles, map(row, events[:ROWS]), numbers=True),
            "\nOperations of prime_kernels, forward (their backward passes are rows such as LinearPPOLossBackward):\n",
            grid(titles, map(row, ours), numbers=True),
            f"\nTrace: {trace} (ui.perfetto.dev or chrome://tracing)\n",
        ]
    )


def _device(on_gpu: bool) -> str:
    return torch.cuda.get_device_name() if on_gpu else f"{torch.get_num_threads()} CPU threads"
