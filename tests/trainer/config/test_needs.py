"""Which models, passes and log-probs each configuration asks for."""

import dataclasses

import pytest

from prime_trainer.config.needs import Needs
from prime_trainer.config.run_config import RunConfig

PRIME = Needs(
    prm=True,
    policy_is_reference=False,
    reference=True,
    old_logp=True,
    ppo_ratio=True,
    candidates=False,
    fused_policy_loss=True,
)
TRANSFORMERS = {"rollout": {"engine": "transformers"}}
ONE_STEP = {"policy": {"minibatches": 1}}

CASES = {
    "the paper's": ({}, {}),
    "outcomes alone": ({"algorithm": {"process_coef": 0}}, {"prm": False, "reference": False}),
    "the policy as reference": ({"prm": {"ref_type": "policy"}}, {"policy_is_reference": True, "reference": False}),
    "outcomes alone, whatever the reference": (
        {"algorithm": {"process_coef": 0}, "prm": {"ref_type": "policy"}},
        {"prm": False, "reference": False},
    ),
    "a KL penalty": (
        {"policy": {"kl_coef": 0.1}, "algorithm": {"process_coef": 0}},
        {"prm": False, "fused_policy_loss": False},
    ),
    "an entropy bonus": ({"policy": {"entropy_coef": 0.1}}, {"fused_policy_loss": False}),
    "candidates": (
        {"prm": {"ref_type": "policy"}, "algorithm": {"candidates": {"coef": 0.1}}},
        {"policy_is_reference": True, "reference": False, "candidates": True, "fused_policy_loss": False},
    ),
    "one step a batch": (ONE_STEP, {"old_logp": False, "ppo_ratio": False}),
    "one minibatch, two epochs": ({"policy": {"minibatches": 1, "epochs": 2}}, {}),
    "one step by the policy's own reference": (
        {**ONE_STEP, "prm": {"ref_type": "policy"}},
        {"policy_is_reference": True, "reference": False, "ppo_ratio": False},
    ),
    "one step, an engine's samples": ({**ONE_STEP, "rollout": {"engine": "vllm-server"}}, {"ppo_ratio": False}),
    "one step, an engine's samples uncorrected": (
        {**ONE_STEP, "rollout": {"engine": "vllm-server", "tis_cap": 0}},
        {"ppo_ratio": False},
    ),
    "one step, transformers corrected": (
        {**ONE_STEP, "rollout": {"engine": "transformers", "tis_cap": 2}},
        {"ppo_ratio": False},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_needs(name):
    changes, wanted = CASES[name]
    assert RunConfig(**{**TRANSFORMERS, **changes}).needs == dataclasses.replace(PRIME, **wanted)
