"""Signals, closed streams, removed folders and errors: what ends a run leaves what it has done, in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ranks
from helpers.checkpoints import load_latest
from safetensors.torch import load_file

from prime_trainer import cli, loop, sft
from prime_trainer.errors import RunError
from prime_trainer.models import loading
from prime_trainer.run.metrics import MetricsWriter
from prime_trainer.run.stop_signal import stop_signal
from prime_trainer.train import trainable


@pytest.fixture(autouse=True)
def verifier(monkeypatch):
    monkeypatch.setattr(loop, "Verifier", ranks.RandomVerifier)


def assert_same_weights(a, b):
    one, other = (load_file(path / "final" / "model.safetensors") for path in (a, b))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def rows(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def test_sighup_asks_for_a_stop_and_is_never_the_second_signal(capsys):
    with stop_signal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert stop.is_set()
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    assert capsys.readouterr().err.count("stopping after this step") == 1


def test_an_ignored_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.is_set() and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lines_that_nobody_reads_end_nothing(tmp_path):
    """As before `| head -1`: the reader is gone, and 200 lines follow."""
    code = (
        "import pathlib, sys\nfrom prime_trainer import cli\n"
        "def talk(words):\n"
        "    for k in range(200): print('x' * 5000, flush=True); print('y' * 5000, file=sys.stderr)\n"
        "    pathlib.Path(words[0]).write_text('done')\n    return 0\n"
        "cli.COMMANDS['talk'] = cli.Command(talk, '')\n"
        "sys.exit(cli.main(['talk', sys.argv[1]]))\n"
    )
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path / "talk"], stdout=write, stderr=write)
    os.close(write)
    os.read(read, 100)
    os.close(read)
    try:
        assert process.wait(100) == 0
        assert (tmp_path / "talk").read_text() == "done"
    finally:
        process.kill()


def test_without_standard_streams_a_command_still_ends_well():
    code = "import sys\nsys.stdout = sys.stderr = None\nfrom prime_trainer import cli\nsys.exit(cli.main(['--help']))"
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == 0


def test_a_record_whose_folder_is_gone_says_so(tmp_path):
    writer = MetricsWriter(tmp_path / "run", None)
    writer.log("rl", 1, {"reward": 0.5})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match=r"run/metrics\.jsonl was removed or replaced while rows"):
        writer.log("rl", 2, {"reward": 0.5})
    writer.close()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["rl", "sft"])
def test_an_output_that_is_removed_ends_the_run_in_one_line(run_config, tmp_path, monkeypatch, capfd, command):
    step = trainable.Trainable.step

    def removing(self, *scale):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return step(self, *scale)

    monkeypatch.setattr(trainable.Trainable, "step", removing)
    monkeypatch.setattr(cli, "_config", lambda words: run_config(checkpoint={"every": 1}))
    assert cli.main([command]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said and "Exception in thread" not in said
    assert (
        said.count("prime-trainer: error: ") == 1
        and f"{tmp_path / 'run' / 'metrics.jsonl'} was removed or replaced" in said
    )


@pytest.mark.parametrize(("run", "owner", "work"), [(loop.run, loop.PRMScorer, "score"), (sft.run, sft, "predicting")])
def test_an_error_between_two_steps_leaves_all_that_was_done(
    run_config, tmp_path, monkeypatch, capsys, run, owner, work
):
    """Here before the third step has changed a weight; the run goes on with the same batch."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(run_config(output=whole))
    original, calls = getattr(owner, work), []

    def failing(*words, **options):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of something")
        return original(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, work, failing)
        with pytest.raises(RuntimeError, match="out of something"):
            run(run_config(output=parts))
    assert "a checkpoint of step 2 is left" in capsys.readouterr().err
    assert load_latest(parts)["step"] == 2
    run(run_config(output=parts, resume=True))
    assert_same_weights(whole, parts)
    assert rows(whole) == rows(parts)


def test_a_half_done_step_leaves_no_checkpoint_and_says_so(run_config, tmp_path, monkeypatch, capsys):
    """The PRM has learned from the batch, the policy has not."""

    def failing(*words, **options):
        raise RuntimeError("out of something")

    monkeypatch.setattr(loop, "policy_update", failing)
    with pytest.raises(RuntimeError, match="out of something"):
        loop.run(run_config())
    assert "step 1 failed half done: no checkpoint of it" in capsys.readouterr().err
    assert load_latest(tmp_path / "run") is None


def test_a_model_that_cannot_be_saved_costs_no_step(run_config, tmp_path, monkeypatch):
    def full(*words):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(loading, "save", full)
        with pytest.raises(OSError, match="No space left"):
            sft.run(run_config())
    assert load_latest(tmp_path / "run")["step"] == 3
    sft.run(run_config(resume=True))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("stage", ["rl", "sft"])
def test_a_model_that_was_replaced_is_not_resumed_with(run_config, model_dir, tmp_path, stage, capsys):
    run = {"rl": loop, "sft": sft}[stage].run
    mine = shutil.copytree(model_dir, tmp_path / "model")
    changes = {"model": {"path": str(mine)}, "checkpoint": {"every": 1}}
    run(run_config(steps=2, **changes))
    kept = json.loads((tmp_path / "run" / "fingerprints.json").read_text())
    assert set(kept) == ({"policy", "prm", "reference"} if stage == "rl" else {"model.path"})
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match=r"--resume: the files of .* are not what they were when the run began"):
        run(run_config(steps=3, resume=True, **changes))


def test_a_run_of_an_earlier_version_goes_on_with_a_note(run_config, monkeypatch, capsys):
    """Its checkpoints have no fingerprints, and not every key of today's configuration."""
    state_dict = loop.Run.state_dict

    def earlier(self):
        state = {k: v for k, v in state_dict(self).items() if k != "models"}
        config = json.loads(state["config"])
        del config["wait_lock"], config["task"]["bad_rows"]
        return state | {"config": json.dumps(config)}

    with monkeypatch.context() as patch:
        patch.setattr(loop.Run, "state_dict", earlier)
        loop.run(run_config(steps=1))
    loop.run(run_config(steps=2, resume=True))
    assert "the run kept no fingerprints of its models" in capsys.readouterr().err
