"""SIGKILL at moments that nothing chooses: what goes on afterwards ends bit for bit as if nothing had happened."""

import json
import os
import random
import shutil
import time

import pytest
import torch
from helpers import faults, ranks
from safetensors.torch import load_file

COMMANDS = ("sft", "rl", "prm", "score", "generate")
KILLS = int(os.environ.get("PRIME_TRAINER_TEST_KILLS", len(COMMANDS)))


def record(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def assert_same(command, one, other):
    if command == "score":
        assert (one / "scores.jsonl").read_bytes() == (other / "scores.jsonl").read_bytes()
    elif command == "generate":
        assert (one / "bench" / "amc.jsonl").read_bytes() == (other / "bench" / "amc.jsonl").read_bytes()
    else:
        trained = [[row for row in record(run) if row["stage"] == command] for run in (one, other)]
        assert trained[0] == trained[1] and trained[0]
        for name in ("final", "prm") if command == "rl" else ("final",):
            a, b = (load_file(run / name / "model.safetensors") for run in (one, other))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def settings(make_config, model_dir, tmp_path_factory):
    """A small run of every command, in a folder of a name."""
    root = tmp_path_factory.mktemp("kills")
    rows, problems = root / "rows.jsonl", root / "amc.jsonl"
    text = [{"prompt": f"{k // 2} + 1?", "response": f"It is {k}.\n\nSo {k}.", "label": k % 2} for k in range(48)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in text))
    problems.write_text("".join(json.dumps({"question": f"{k} + 1?", "answer": k + 1}) + "\n" for k in range(83)))

    def make(name):
        return make_config(
            output=root / name,
            steps=5,
            checkpoint={"every": 1},
            sft={"demonstrations": 24, "epochs": 2},
            train_prm={"path": rows, "cache": root / name / "cache", "batch_size": 4, "lr": 1e-3},
            score={"path": rows, "reference": model_dir, "window": 4},
            bench={"paths": {"amc": problems}, "tasks": ("amc",), "max_new_tokens": 6},
            eval={"every": 0, "batch_size": 8},
        )

    return make


@pytest.fixture(scope="module")
def whole(settings):
    """`whole("rl")`: the folder of an uninterrupted run, and the seconds that it took."""
    found = {}

    def run(command):
        if command not in found:
            ranks.warm()
            cfg, begin = settings(f"whole-{command}"), time.monotonic()
            ranks.train(cfg, 0, command=command)
            found[command] = cfg.output, time.monotonic() - begin
        return found[command]

    return run


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(settings, whole, number):
    """PRIME_TRAINER_TEST_KILLS=30 tries thirty moments, six of each command."""
    command = COMMANDS[number % len(COMMANDS)]
    output, lasted = whole(command)
    share = random.Random().uniform(0.0, 1.0)
    for attempt in range(4):  # the machine may be quicker than it was
        cfg, seconds = settings(f"killed-{number}-{attempt}"), share * lasted * 0.7**attempt
        codes = ranks.wait(ranks.start(cfg, 0, faults.kill_after, seconds, command=command))
        if codes == [-9]:
            break
    begun = (cfg.output / ("scores.jsonl" if command == "score" else "config.json")).exists()
    print(f"{command}: {'killed' if codes == [-9] else 'already ended'} after {seconds:.2f} s of {lasted:.2f} s")
    ranks.train(cfg.model_copy(update={"resume": begun and command != "generate"}), 0, command=command)
    assert_same(command, output, cfg.output)
    shutil.rmtree(cfg.output)
