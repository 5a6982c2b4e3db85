"""Seconds of a step: the arithmetic with fixed rates, and what the probes run."""

import dataclasses

import pytest
import torch

from prime_trainer import calibrate, loop
from prime_trainer.cli import main
from prime_trainer.plan import seconds
from prime_trainer.plan.seconds import Rates

RATES = Rates(groups=4, score=1.0, prm=3.0, policy=4.0, optimizer=0.5, first_token=2.0, next_token=0.25)
# 16 groups are four probes; 64 responses are two batches; a response has 9 tokens.
ROLLOUT = {"prompts_per_step": 16, "n": 4, "batch_size": 32}
SAMPLED = 2 * (2.0 + 8 * 0.25)


def predicted(run_config, rates=RATES, **sections):
    cfg = run_config(rollout=ROLLOUT, **sections)
    return seconds.predict(rates, cfg.needs, cfg.policy, cfg.prm, cfg.rollout, 9)


@pytest.mark.parametrize(
    "sections, want",
    [
        # The frozen reference scores; one optimizer step of each.
        ({}, {"rollout": SAMPLED, "score": 4.0, "prm": 12.0 + 0.5, "policy": 16.0 + 0.5}),
        # The policy's own pass is the reference.
        ({"prm": {"ref_type": "policy"}}, {"rollout": SAMPLED, "score": 4.0, "prm": 12.5, "policy": 16.5}),
        ({"prm": {"update": "before", "minibatches": 2}},
         {"rollout": SAMPLED, "score": 8.0, "prm": 13.0, "policy": 16.5}),
        ({"prm": {"update": "none"}}, {"rollout": SAMPLED, "score": 8.0, "policy": 16.5}),
        # Pairs: all log-ratios before the first gradient.
        ({"prm": {"kind": "dpo"}}, {"rollout": SAMPLED, "score": 4.0, "prm": 16.5, "policy": 16.5}),
        ({"prm": {"kind": "dpo", "minibatches": 4}}, {"rollout": SAMPLED, "score": 4.0, "prm": 14.0, "policy": 16.5}),
        ({"algorithm": {"process_coef": 0.0}}, {"rollout": SAMPLED, "policy": 16.5}),
        # Two epochs of two minibatches compare with log-probs from before them.
        ({"algorithm": {"process_coef": 0.0}, "policy": {"epochs": 2, "minibatches": 2}},
         {"rollout": SAMPLED, "score": 4.0, "policy": 32.0 + 4 * 0.5}),
    ],
    ids=str,
)  # fmt: skip
def test_each_stage_is_counted(run_config, sections, want):
    assert predicted(run_config, **sections) == want


def test_an_engine_that_is_not_probed_is_left_out_and_named(run_config):
    rates = dataclasses.replace(RATES, first_token=None)
    found = predicted(run_config, rates)
    assert "rollout" not in found
    cfg = run_config(rollout=ROLLOUT)
    text = seconds.render(rates, found, cfg.rollout, 9)
    assert "rollouts of transformers apart" in text and "**33.0**" in text and "| policy | 16.5 | 50% |" in text


@pytest.mark.parametrize("layout_limit, groups", [(1024, 3), (0, 1)])
def test_probes_are_a_pass_of_the_runs_own(run_config, monkeypatch, layout_limit, groups):
    """Groups of 5 + 3 * 4 tokens share a row; of rows of 9 tokens each, 27 a group."""
    monkeypatch.setattr("prime_trainer.train.batch.SHARED_ROW_LIMIT", layout_limit)
    cfg = run_config(micro_batch_tokens=53, rollout={"prompts_per_step": 7})
    rates = calibrate.probe(cfg, prompt_tokens=5, response_tokens=4)
    assert rates.groups == groups
    assert min(dataclasses.astuple(rates)) > 0


def test_a_probe_leaves_out_the_optimizer_and_what_does_not_count(monkeypatch):
    now = iter([0, 10, 100, 105, 200, 204])
    monkeypatch.setattr(calibrate, "_now", lambda device: next(now))
    trained = calibrate._Clocked.__new__(calibrate._Clocked)
    trained.spent = [1.0]
    assert calibrate._least(lambda: None, torch.device("cpu"), trained) == 3.0


def test_command(run_config, tmp_path, capsys):
    cfg, path = run_config(), tmp_path / "run.toml"
    sections = ["[model]", f'path = "{cfg.model.path}"', 'dtype = "float32"', 'device = "cpu"']
    path.write_text("\n".join([*sections, "[rollout]", 'engine = "transformers"', "prompts_per_step = 2", "n = 2"]))
    words = ["plan", str(path), "--calibrate", "--prompt-tokens", "4", "--response-tokens", "6"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "responses of 6 tokens by probes of 2 groups" in out
    stages = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("|")]
    assert stages == ["seconds of a step", "---", "rollout", "score", "prm", "policy", "**sum**"]
    assert main([*words, "--gpus", "2"]) == 2 and "expected --gpus 1, got 2" in capsys.readouterr().err
    assert main(["plan", str(path), "--response-tokens", "6"]) == 2
    assert "--response-tokens is for plan --calibrate" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"algorithm\.candidates\.coef must be 0"):
        calibrate.run(run_config(algorithm={"candidates": {"coef": 0.1}}, prm={"ref_type": "policy"}), 4)


def test_stages_are_those_of_a_step(run_config):
    """A name of the prediction is one of the loop's clock, `score` being part of `prm` where the PRM is updated."""
    run = loop.Run(run_config())
    stages = {key.removeprefix("time/") for key in run.train_step().metrics if key.startswith("time/")}
    run.close()
    assert set(predicted(run_config)) - {"score"} <= stages
