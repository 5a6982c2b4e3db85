"""Runs of earlier versions go on: their configurations have no keys for what came later."""

import json

import pytest

from prime_trainer.config.run_config import RunConfig
from prime_trainer.run import checkpoint

LATER = {
    "model": ("logits_dtype",),
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
    checkpoint._same_config(json.dumps(old), cfg, tmp_path)
    for key, value in (("margin", 4.0), ("kind", "prefix")):
        prm = {"kind": "prefix", key: value, "beta": old["prm"]["beta"]}
        with pytest.raises(ValueError, match=r"the configuration has changed \(prm: "):
            checkpoint._same_config(json.dumps(old), RunConfig(**given | {"prm": prm}), tmp_path)


def test_the_scale_of_rewards_follows_the_loss():
    assert RunConfig().prm.beta == RunConfig().train_prm.beta == 0.05
    cfg = RunConfig(prm={"kind": "prefix"}, train_prm={"kind": "prefix", "beta": 3.0})
    assert (cfg.prm.beta, cfg.train_prm.beta, cfg.prm.margin) == (10.0, 3.0, 5.0)
