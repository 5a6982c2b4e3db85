"""A run that is killed, starved of disk, fed NaN or told to end goes on exactly where it was, or says what is wrong."""

import dataclasses
import json
import os
import shutil
import time

import pytest
import torch
from helpers import faults, ranks
from helpers.checkpoints import load_latest
from safetensors.torch import load_file

from prime_trainer import loop
from prime_trainer.data.groups import Group
from prime_trainer.models import tokenizers
from prime_trainer.run import checkpoint


def rows(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time")} for line in lines]


def steps_of(path):
    return [row for row in rows(path) if row["stage"] == "rl"]


def assert_same_runs(a, b):
    assert steps_of(a) == steps_of(b)
    for name in ("final", "prm"):
        one, other = (load_file(path / name / "model.safetensors") for path in (a, b))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def settings(make_config, tmp_path_factory):
    root = tmp_path_factory.mktemp("faults")

    def make(name, **changes):
        return make_config(**{"output": root / name, "steps": 5, "checkpoint": {"every": 1}} | changes)

    return make


@pytest.fixture(scope="module")
def whole(settings):
    """An uninterrupted run."""
    ranks.warm()
    cfg = settings("whole")
    ranks.train(cfg, 0)
    return cfg.output


@pytest.fixture
def output(settings):
    """A run's directory under a name of its own, for runs that begin, end badly and go on."""
    made = []

    def make(name, **changes):
        made.append(settings(name, **changes))
        return made[-1]

    yield make
    for cfg in made:
        shutil.rmtree(cfg.output, ignore_errors=True)


@pytest.mark.parametrize("where", ["tensors", "sealed", "renamed"])
def test_killed_in_a_checkpoint(output, whole, where):
    cfg = output(f"torn-{where}")
    assert ranks.wait(ranks.start(cfg, 0, faults.kill_in_checkpoint, 3, where)) == [-9]
    assert load_latest(cfg.output)["step"] == (3 if where == "renamed" else 2)
    ranks.train(cfg.model_copy(update={"resume": True}), 0)
    assert_same_runs(whole, cfg.output)
    assert sorted(p.name for p in (cfg.output / "checkpoints").iterdir()) == ["step_000004", "step_000005"]


def test_a_full_disk_leaves_the_checkpoint_before(output, whole):
    cfg = output("full")
    assert ranks.wait(ranks.start(cfg, 0, faults.file_size_limit, 100_000, 3)) == [1]
    said = ranks.log(cfg).read_text()
    assert "prime-trainer: error: the checkpoint of step 3 could not be written" in said and "Traceback" not in said
    assert "step_000002 is whole" in said and load_latest(cfg.output)["step"] == 2
    ranks.train(cfg.model_copy(update={"resume": True}), 0)
    assert_same_runs(whole, cfg.output)


def test_sigterm_leaves_a_checkpoint_and_status_0(output, whole):
    cfg = output("terminated", checkpoint={"every": 0})
    ranks.train(cfg, 0, faults.terminate_at, 2)
    assert load_latest(cfg.output)["step"] == 2
    ranks.train(cfg.model_copy(update={"resume": True}), 0)
    assert_same_runs(whole, cfg.output)


@pytest.mark.parametrize("fault", [faults.nan_advantages, faults.nan_scores])
def test_a_step_without_a_finite_gradient_is_skipped(output, fault):
    cfg = output(f"nan-{fault.__name__}")
    ranks.train(cfg, 0, fault, [2])
    assert [row["skipped"] for row in steps_of(cfg.output)] == [0, 1, 0, 0, 0]
    saved = load_latest(cfg.output)
    assert saved["skips"] == {"total": 1, "in_row": 0}
    steps = {state["step"].item() for state in saved["policy"]["optimizer"]["state"].values()}
    assert steps == {4} and all(torch.isfinite(master).all() for master in saved["policy"]["master"])


@pytest.mark.parametrize("steps", [5, 6])
def test_too_many_skipped_steps_end_the_run_with_their_batch(output, steps):
    """In the last step, too: its checkpoint would resume into a finished run."""
    cfg = output(f"many-{steps}", steps=steps, policy={"max_skipped": 2})
    assert ranks.wait(ranks.start(cfg, 0, faults.nan_advantages, [2, 4, 5])) == [1]
    said = ranks.log(cfg).read_text()
    assert "step 5: no finite loss or gradient for 2 steps in a row (policy.max_skipped)" in said
    batch = json.loads((cfg.output / "skipped_batch.json").read_text())
    assert batch["step"] == 5 and [len(group["responses"]) for group in batch["groups"]] == [3, 3]
    assert set(batch["groups"][0]) == {field.name for field in dataclasses.fields(Group)}
    assert load_latest(cfg.output)["skips"] == ({"total": 3, "in_row": 2} if steps == 6 else {"total": 2, "in_row": 1})
    assert not (cfg.output / "final").exists()
    patient = cfg.model_copy(update={"resume": True, "policy": cfg.policy.model_copy(update={"max_skipped": 3})})
    ranks.train(patient, 0)
    assert load_latest(cfg.output)["step"] == steps and (cfg.output / "final").exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_the_others_say_which_rank_died(output, dead):
    """With rank 0 goes the store that they beat in."""
    cfg = output(f"dead-{dead}")
    begin = time.monotonic()
    assert ranks.wait(ranks.start(cfg, 2, faults.quick_watch, 15.0, dead, 3)) == [-9, 1][:: -1 if dead else 1]
    assert time.monotonic() - begin < 60
    said = ranks.log(cfg, 1 - dead).read_text()
    found = "rank 1 (" if dead else "rank 0, or the launcher that keeps the ranks' store, is gone"
    assert found in said and f"rank {1 - dead} of 2 ends too" in said
    assert not dead or "has not been heard of for 15 s" in said


def test_resume_on_other_numbers_of_ranks(output):
    changes = {"steps": 4, "policy": {"lr": 2e-5}}
    alone = output("alone", **changes)
    ranks.train(alone, 0)
    for before, after in ((0, 2), (2, 0)):
        cfg = output(f"ranks-{before}-{after}", **changes)
        ranks.train(cfg.model_copy(update={"steps": 2}), before)
        ranks.train(cfg.model_copy(update={"resume": True}), after)
        assert len(steps_of(cfg.output)) == 4
        for one, other in zip(steps_of(alone.output), steps_of(cfg.output), strict=True):
            assert {k: v for k, v in one.items() if k != "stage"} == pytest.approx(
                {k: v for k, v in other.items() if k != "stage"}, abs=1e-5, rel=1e-5
            )
        for name in ("final", "prm"):
            one, other = (load_file(path / name / "model.safetensors") for path in (alone.output, cfg.output))
            assert max((one[key] - other[key]).abs().max().item() for key in one) <= 1e-5


def test_resume_on_as_many_ranks_is_exact(output):
    for name, parts in (("all", [4]), ("halves", [2, 4])):
        for steps in parts:
            cfg = output(name, steps=steps, resume=steps == 4 and name == "halves")
            ranks.train(cfg, 2)
    assert_same_runs(output("all").output, output("halves").output)


class TestRefused:
    @pytest.fixture(autouse=True)
    def verifier(self, monkeypatch):
        monkeypatch.setattr(loop, "Verifier", ranks.RandomVerifier)

    @pytest.fixture
    def saved(self, run_config):
        loop.run(run_config(steps=1))
        return run_config(steps=2, resume=True)

    def test_a_changed_file(self, saved):
        (file,) = (saved.output / "checkpoints").glob("step_*/*.distcp")
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(ValueError, match=rf"step_000001 is corrupted: {file.name} has another SHA-256"):
            loop.run(saved)

    def test_a_shorter_and_a_missing_file(self, saved):
        directory = saved.output / "checkpoints" / "step_000001"
        (directory / ".metadata").unlink()
        size = (directory / "state.pt").stat().st_size
        os.truncate(directory / "state.pt", size - 10)
        with pytest.raises(
            ValueError, match=rf"\.metadata is missing; state\.pt has {size - 10} bytes instead of {size}"
        ):
            checkpoint.load(directory)
        with pytest.raises(ValueError, match=rf"is corrupted: state\.pt has {size - 10} bytes instead of {size}"):
            loop.run(saved)

    def test_another_tokenizer(self, saved, monkeypatch):
        load = tokenizers.load_tokenizer

        def other(cfg):
            tokenizer = load(cfg)
            tokenizer.add_tokens(["more"])
            return tokenizer

        monkeypatch.setattr(tokenizers, "load_tokenizer", other)
        with pytest.raises(ValueError, match=r"--resume: the tokenizer has changed \(size: (\d+) -> (\d+); vocabulary"):
            loop.run(saved)

    def test_another_configuration_before_the_first_checkpoint(self, run_config):
        cfg = run_config()
        checkpoint.write_config(cfg, {})
        assert checkpoint.resume_point(run_config(resume=True), {}) is None
        with pytest.raises(ValueError, match=r"configuration has changed \(seed: 0 -> 1\)"):
            checkpoint.resume_point(run_config(resume=True, seed=1), {})
