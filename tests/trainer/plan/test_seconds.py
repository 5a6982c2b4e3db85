"""Seconds of a step: the arithmetic with fixed rates, and what the probes run."""

import dataclasses

import pytest
import torch

from prime_trainer import calibrate, loop
from prime_trainer.cli import main
from prime_trainer.data.groups import Group, Response
from prime_trainer.plan import seconds
from prime_trainer.plan.seconds import Rates

RATES = Rates(
    score=0.25, prm=0.75, policy=1.0, optimizer=0.5, first_token=2.0, overhead=0.125, next_token=0.25
)  # fmt: skip
# 64 responses are two batches; a response has 9 tokens, the longest 13.
ROLLOUT = {"prompts_per_step": 16, "n": 4, "batch_size": 32, "max_new_tokens": 13}
SAMPLED = 2 * (2.0 + 12 * 0.125 + 8 * 0.25)


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


def test_probes_are_passes_of_the_runs_own(run_config, monkeypatch):
    """Groups of 5 + 3 * 4 tokens share a row: three fit into 53 tokens, and two are a minibatch of the policy."""
    sizes, score, update = [], calibrate.Scorer.log_probs, calibrate.policy_update

    def scored(self, model, batch, parts):
        sizes.append(("score", len(batch.groups)))
        return score(self, model, batch, parts)

    def updated(trained, batch, *given, **options):
        sizes.append(("policy", len(batch.groups)))
        return update(trained, batch, *given, **options)

    monkeypatch.setattr(calibrate.Scorer, "log_probs", scored)
    monkeypatch.setattr(calibrate, "policy_update", updated)
    monkeypatch.setattr(calibrate, "_groups", lambda model, count, n, prompt, mean, most: [
        Group([5] * prompt, [Response([7] * mean) for _ in range(n)]) for _ in range(count)
    ])  # fmt: skip
    cfg = run_config(micro_batch_tokens=53, rollout={"prompts_per_step": 7}, policy={"minibatches": 3})
    rates = calibrate.probe(cfg, prompt_tokens=5, response_tokens=4)
    assert set(sizes) == {("score", 3), ("policy", 2)}
    assert min(rates.score, rates.prm, rates.policy, rates.optimizer) > 0 and rates.first_token is not None


def test_probed_responses_have_the_lengths_asked_for(model):
    groups = calibrate._groups(model, count=20, n=4, prompt_tokens=3, mean=8, most=11)
    found = [len(response.ids) for group in groups for response in group.responses]
    assert min(found) == 4 and max(found) == 11 and 6.5 < sum(found) / 80 < 8.5
    assert all(len(group.prompt_ids) == 3 for group in groups)


def test_a_probe_is_the_median_without_the_optimizer_and_the_first(monkeypatch):
    now = iter([0, 10, 100, 105, 200, 204, 300, 309])
    monkeypatch.setattr(calibrate, "_now", lambda device: next(now))
    trained = calibrate._Clocked.__new__(calibrate._Clocked)
    trained.spent = [1.0]
    assert calibrate._median(lambda: None, torch.device("cpu"), trained) == 4.0


def test_command(run_config, tmp_path, capsys):
    cfg, path = run_config(), tmp_path / "run.toml"
    sections = ["[model]", f'path = "{cfg.model.path}"', 'dtype = "float32"', 'device = "cpu"']
    path.write_text("\n".join([*sections, "[rollout]", 'engine = "transformers"', "prompts_per_step = 2", "n = 2"]))
    words = ["plan", str(path), "--calibrate", "--prompt-tokens", "4", "--response-tokens", "6"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "responses of 6 tokens by probes of this device" in out
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
