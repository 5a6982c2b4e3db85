"""Under torchrun itself: a rank that dies is started anew and goes on, and SIGTERM leaves a checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from helpers import ranks
from helpers.checkpoints import load_latest

TESTS = Path(__file__).parents[2]
RANK = """
import json, os, sys
sys.path.insert(0, {tests!r})
from helpers import faults, ranks
from prime_trainer import cli, config, loop
loop.Verifier = ranks.RandomVerifier
cli._config = lambda words: config.RunConfig(**json.loads({settings!r}))
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    faults.quick_watch(6.0, 1, 3)
raise SystemExit(cli.main(["rl"]))
"""


def test_a_rank_that_dies_is_started_anew_and_sigterm_leaves_a_checkpoint(make_config, tmp_path):
    cfg = make_config(output=tmp_path / "run", steps=1000, checkpoint={"every": 1})
    script, log = tmp_path / "rank.py", tmp_path / "log"
    script.write_text(RANK.format(tests=str(TESTS), settings=cfg.model_dump_json()))
    options = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.2"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with log.open("w") as output:
        torchrun = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, str(script)],
            stdout=output, stderr=subprocess.STDOUT, env=env, cwd=tmp_path,
        )  # fmt: skip
    try:
        wait_for_step(cfg.output, 4, torchrun, log)  # beyond the death in step 3
        torchrun.send_signal(signal.SIGTERM)
        torchrun.wait(60)
    finally:
        for process in [*psutil.Process(torchrun.pid).children(recursive=True)] if torchrun.poll() is None else []:
            process.kill()
        torchrun.kill()
        torchrun.wait()
    said = log.read_text()
    assert said.count("stopping after this step") == 2, said[-3000:]
    steps = [row["step"] for stage, row in ranks.rows(cfg.output) if stage == "rl"]
    assert steps == list(range(1, len(steps) + 1)) and load_latest(cfg.output)["step"] == len(steps)
    assert (cfg.output / "final" / "model.safetensors").is_file()


def wait_for_step(output, step, process, log, seconds=300):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        metrics = output / "metrics.jsonl"
        if metrics.exists() and len([s for s, _ in complete_rows(output) if s == "rl"]) >= step:
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def complete_rows(output):
    try:
        return ranks.rows(output)
    except ValueError:  # a line is being written
        return []
