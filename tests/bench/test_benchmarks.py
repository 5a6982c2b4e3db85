"""No benchmark rots: each runs at its smallest size, and the table of them has every operation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prime_kernels import _dispatch

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"OMP_NUM_THREADS": "1", "PRIME_BENCH_SMALL": "1", "PRIME_BENCH_DEVICE": "cpu"}

# Everything at once, in the fixture.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install '.[test]'")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install '.[train]'")
    folder = tmp_path_factory.mktemp("bench")
    environment = {**os.environ, **SIZES, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    run = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", "--benchmark-enable"]
    table = ["bench/table.py", folder / "run.json", folder / "table", "Smallest sizes"]
    for command in ([*run, f"--benchmark-json={folder / 'run.json'}"], table):
        done = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=ROOT, env=environment
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return folder / "table"


def test_every_operation_is_timed(results):
    measured = json.loads((results / "results.json").read_text())["results"]
    ways = {}
    for one in measured:
        ways.setdefault(one["group"].split(",")[0].split(" ")[0], set()).add(one["way"])
        assert len(one["seconds"]) >= 1 and min(one["seconds"]) > 0
    for op in _dispatch.OPERATIONS:
        assert {"eager", "compile"} <= ways[op] and ways[op] & {"cpu", "kernel"}, op


def test_table(results):
    head, _, *lines = [line for line in (results / "README.md").read_text().splitlines() if line.startswith("| ")]
    names = [name.strip() for name in head.strip("| ").split("|")]
    assert names[:3] == ["operation", "way", "median ms"]
    assert {"GB/s", "TFLOP/s", "of ceiling", "peak MiB", "faster than eager", "faster than torch.compile"} <= {*names}
    rows = [dict(zip(names, (cell.strip() for cell in line[1:-1].split("|")), strict=True)) for line in lines]
    eager = next(row for row in rows if row["operation"].startswith("log_probs, forward") and row["way"] == "eager")
    assert eager["faster than eager"] == "1.0x"
    copy = next(row for row in rows if row["operation"] == "ceiling: copy")
    assert float(copy["of ceiling"]) == 1.0
    assert (results / "table.png").read_bytes().startswith(b"\x89PNG")
