"""bench/gpu.sh without a GPU: its order, what it keeps when it is cut short, and the smoke test on CPU backends."""

import json
import os
import signal
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Stands in for Python: answers what the script asks of torch, writes the JSON of a benchmark, notes its arguments.
STAND_IN = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *get_device_capability*) echo 90 ;;
  *xdist*) exit 1 ;;
  *"import sys, torch"*) echo 3.12 2.11 13.0 ;;
  *pip*) exit "${BUILD_STATUS:-0}" ;;
  *smoke.py*) echo "0 failed"; exit "${SMOKE_STATUS:-0}" ;;
esac
[ -z "${PRIME_BENCH_JSON:-}" ] || echo '{"benchmarks": []}' >"$PRIME_BENCH_JSON"
case "$*" in *--benchmark-enable*) sleep "${SLOW:-0}" ;; esac
"""

# Before that: a benchmark that would run for ever, and ends at an interrupt.
FINISHES = """case "$*" in
  *"prime_kernels bench"*) trap 'echo finished the table; exit 0' INT; while :; do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """`run("measure", SMOKE_STATUS="1")`: exit status, output, calls of Python and names in the archive."""
    checkout = tmp_path / "checkout"
    (checkout / "bench").mkdir(parents=True)
    (checkout / "bench" / "gpu.sh").write_text((ROOT / "bench" / "gpu.sh").read_text())
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)

    def go(*phases, **variables):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(python), "OUT": str(tmp_path / "out")}
        done = subprocess.run(
            ["bash", "bench/gpu.sh", *phases],
            cwd=checkout, env=environment | {"CALLS": str(calls)} | variables, capture_output=True, text=True,
            timeout=120,
        )  # fmt: skip
        with tarfile.open(tmp_path / "out" / "gpu.tar") as archive:
            names = archive.getnames()
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines(), names

    return go


def place(calls, word):
    return next(i for i, call in enumerate(calls) if word in call)


def test_measures_before_it_tests_and_tunes_last(run):
    status, said, calls, names = run()
    assert status == 0, said
    order = [
        "pip install",
        "smoke.py",
        "-m prime_kernels bench",
        "test_ceiling",
        "test_log_probs.py",
        "-k compile",
        "-m gpu tests/ops",
        "tune.py",
    ]
    assert [place(calls, word) for word in order] == sorted(place(calls, word) for word in order)
    # A table after every part that measures, of everything until then.
    tables = [call for call in calls if "table.py" in call]
    assert len(tables) == sum("--benchmark-enable" in call for call in calls) and len(tables[-1]) > len(tables[0])
    assert {"gpu/device.txt", "gpu/build.log", "gpu/measure_linear.json", "gpu/tests_fuzz.log"} <= set(names)


def test_peers_that_are_carried_are_installed_without_a_network(run, tmp_path):
    (tmp_path / "trl-1-py3-none-any.whl").touch()
    _, _, calls, names = run("measure", WHEELS=str(tmp_path))
    install = place(calls, "trl-1-py3-none-any.whl")
    assert "--no-index --no-deps --target build/peers" in calls[install] and "gpu/wheels.log" in names
    assert place(calls, "pip install") < install < place(calls, "-m prime_kernels bench")
    assert not any("--no-index" in call for call in run("measure")[2])


def test_a_phase_alone(run):
    _, _, calls, _ = run("tune")
    assert any("tune.py" in call for call in calls) and not any("--benchmark-enable" in call for call in calls)


def test_what_fails_does_not_stop_the_rest_and_is_the_status(run):
    status, said, calls, _ = run("smoke", "measure", SMOKE_STATUS="3")
    assert status == 3 and "smoke: exit 3" in said and any("test_segments" in call for call in calls)


def test_a_failed_build_ends_the_call_and_keeps_its_log(run):
    status, said, calls, names = run(BUILD_STATUS="1")
    assert status == 1 and "cannot be built" in said and "gpu/build.log" in names
    assert not any("smoke.py" in call for call in calls)


def test_the_limit_skips_what_would_be_cut_and_keeps_what_was_measured(run):
    _, said, calls, names = run("measure", "tests", LIMIT="25", SLOW="8")
    assert "skipped" in said and "gpu/skipped.txt" in names and "gpu/measure_ceiling.json" in names
    assert not any("test_fuzz" in call for call in calls)


def test_what_is_interrupted_has_written_what_it_measured(tmp_path):
    """As a part that outlasts its time: the benchmarks before the one that hangs are in its JSON."""
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    (tmp_path / "test_slow.py").write_text(
        "import time\nimport pytest\n\n"
        "@pytest.mark.benchmark(group='sleep')\n"
        "@pytest.mark.parametrize('way', ['eager', 'kernel'])\n"
        "def test_one(benchmark, way):\n"
        "    benchmark.extra_info['device'] = 'cpu'\n"
        "    benchmark.pedantic(time.sleep, (0 if way == 'eager' else 300,), rounds=2)\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable", "test_slow.py"]
    target = tmp_path / "measured.json"
    running = subprocess.Popen(
        command, cwd=tmp_path, env=os.environ | {"PRIME_BENCH_JSON": str(target)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not target.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    (one,) = json.loads(target.read_text())["benchmarks"]
    assert one["params"] == {"way": "eager"} and len(one["stats"]["data"]) == 2
    table = [sys.executable, "bench/table.py", str(target), str(tmp_path / "table")]
    subprocess.run(table, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT / "python")}, check=True, timeout=120)
    assert "| sleep | eager | " in (tmp_path / "table" / "README.md").read_text()


def test_a_part_that_outlasts_its_time_may_finish_its_table(run, tmp_path):
    """It is interrupted first, in a background job too, where a shell ignores that."""
    python = tmp_path / "python"
    python.write_text(STAND_IN.replace("#!/usr/bin/env bash\n", "#!/usr/bin/env bash\n" + FINISHES))
    status, said, _, _ = run("measure", LIMIT="12")
    assert "finished the table" in said and status == 124


def test_smoke_passes_on_the_backends_that_run_here():
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "bench/smoke.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "log_probs on cpu: ok" in done.stdout and done.stdout.endswith("0 failed\n")
