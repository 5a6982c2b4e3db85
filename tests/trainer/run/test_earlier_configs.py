"""Runs of earlier versions go on: their configurations lack keys of what came later and have some that went."""

import json

import pytest

import prime_kernels
from prime_trainer.config.run_config import RunConfig
from prime_trainer.run import checkpoint

LATER = {
    "task": ("reward", "reward_batch"),
    "model": ("logits_dtype", "adapter"),
    "rollout": ("tis",),
    "prm": ("margin", "kind", "balance"),
    "train_prm": ("margin",),
    "algorithm": ("estimator", "process_return", "gae_lambda", "whiten_of", "candidates"),
    "policy": ("kl_estimator",),
}


@pytest.mark.parametrize("given", [{}, {"prm": {"beta": 0.1}, "rollout": {"engine": "transformers"}}])
def test_a_run_without_later_keys_goes_on(given, tmp_path):
    cfg = RunConfig(**given)
    old = json.loads(cfg.model_dump_json())
    for section, keys in LATER.items():
        for key in keys:
            del old[section][key]
    del old["metrics"]
    old["sft"]["pack"] = True  # which changed nothing when it went
    checkpoint._same_config(json.dumps(old), cfg, tmp_path)
    for key, value in (("margin", 4.0), ("kind", "prefix")):
        prm = {"kind": "prefix", key: value, "beta": old["prm"]["beta"]}
        with pytest.raises(ValueError, match=r"the configuration has changed \(prm: "):
            checkpoint._same_config(json.dumps(old), RunConfig(**given | {"prm": prm}), tmp_path)


def test_a_run_of_another_name_of_the_distribution_goes_on(tmp_path):
    """Its environment is what it was made with, and of no consequence."""
    cfg = RunConfig(output=tmp_path, resume=True)
    checkpoint.write_config(cfg, {"policy": "a"})
    made_with = json.loads((tmp_path / "environment.json").read_text())
    assert made_with["packages"]["prime-process-rewards"] == prime_kernels.__version__
    made_with["packages"] = {"prime-kernels": "0.1.0"}
    (tmp_path / "environment.json").write_text(json.dumps(made_with))
    assert checkpoint.resume_point(cfg, {"policy": "a"}) is None  # of no checkpoint: from the start
    with pytest.raises(ValueError, match="the files of policy are not what they were"):
        checkpoint.resume_point(cfg, {"policy": "b"})


def test_the_scale_of_rewards_follows_the_loss():
    assert RunConfig().prm.beta == RunConfig().train_prm.beta == 0.05
    cfg = RunConfig(prm={"kind": "prefix"}, train_prm={"kind": "prefix", "beta": 3.0})
    assert (cfg.prm.beta, cfg.train_prm.beta, cfg.prm.margin) == (10.0, 3.0, 5.0)
