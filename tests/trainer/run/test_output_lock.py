"""One process in an output folder, whoever else wants to write there."""

import os
import subprocess
import sys
import threading
import time

import pytest

from prime_trainer import cli
from prime_trainer.errors import RunError
from prime_trainer.run.output_lock import LOCK, output_lock

HOLD = """
import sys
from pathlib import Path
from prime_trainer.run.output_lock import output_lock
with output_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder until its standard input ends, or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_process_names_the_first(holder, tmp_path):
    told = rf"{tmp_path} is in use by process {holder.pid} on .*--wait-lock"
    with pytest.raises(RunError, match=told), output_lock(tmp_path):
        pytest.fail("it is held")


def test_killed_it_holds_nothing(holder, tmp_path):
    holder.kill()
    holder.wait()
    with output_lock(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_who_waits_goes_on_when_the_first_ends(holder, tmp_path, capsys):
    threading.Timer(1.0, holder.stdin.close).start()
    begin = time.monotonic()
    with output_lock(tmp_path, wait=60):
        assert 0.5 < time.monotonic() - begin < 50
    assert f"waiting up to 60 s for process {holder.pid}" in capsys.readouterr().err


def test_who_waits_in_vain_ends(holder, tmp_path):
    told = rf"in use by process {holder.pid} on .* after 0.5 s"
    with pytest.raises(RunError, match=told), output_lock(tmp_path, wait=0.5):
        pytest.fail("it is held")


def test_a_child_does_not_hold_it_for_its_parent(tmp_path):
    ready, tell = os.pipe()
    with output_lock(tmp_path):
        child = os.fork()
        if not child:
            os.write(tell, b"x")
            time.sleep(20)
            os._exit(0)
        os.read(ready, 1)
    os.close(ready)
    os.close(tell)
    try:
        with output_lock(tmp_path):
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@pytest.mark.parametrize("command", ["rl", "sft", "prm", "score", "select", "processbench", "generate", "eval"])
def test_every_command_that_writes(holder, run_config, model_dir, tmp_path, monkeypatch, capsys, command):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    cfg = run_config(
        output=tmp_path,
        train_prm={"path": rows},
        score={"path": rows, "reference": model_dir},
        select={"paths": [rows]},
        processbench={"tune": rows},
        bench={"paths": {"amc": rows}, "tasks": ("amc",)},
    )
    monkeypatch.setattr(cli, "_config", lambda words: cfg)
    assert cli.main([command]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f"is in use by process {holder.pid} on " in said[0]


def test_two_reports_of_one_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "rl", "step": 1, "reward": 0.5}\n')
    with output_lock(tmp_path / "report"):
        assert cli.main(["report", str(tmp_path)]) == 1
    assert f"is in use by process {os.getpid()} on " in capsys.readouterr().err
