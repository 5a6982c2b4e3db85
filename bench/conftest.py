"""Benchmarks are collected without touching sys.path; this lets them share measure.py. And what each of them measured
is written at once: pytest-benchmark writes at the end, and nothing if it is interrupted."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

finished: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def saved(request: pytest.FixtureRequest) -> Iterator[None]:
    """With PRIME_BENCH_JSON=FILE, what bench/table.py reads of every benchmark so far."""
    yield
    target, benchmark = os.environ.get("PRIME_BENCH_JSON"), request.node.funcargs.get("benchmark")
    if not target or benchmark is None or benchmark.stats is None:
        return
    times = benchmark.stats.stats
    finished.append(
        {
            "group": benchmark.group,
            "name": benchmark.name,
            "params": benchmark.params,
            "extra_info": benchmark.extra_info,
            "stats": {"median": times.median, "data": list(times.data)},
        }
    )
    partial = Path(f"{target}.partial")
    partial.write_text(json.dumps({"benchmarks": finished}, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(target)
