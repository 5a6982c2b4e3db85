"""The functions that replace verl's give what verl's give, and its engines and registry get them."""

import importlib
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers.support import run_page

from prime_kernels.integrations import verl as ours

pytest.importorskip("tensordict", reason="verl is not installed: make test-integrations has it")
LOGPROBS = ("logprobs_from_logits", "logprobs_from_logits_naive", "logprobs_from_logits_v2")
ENTROPIES = ("entropy_from_logits", "entropy_from_logits_with_chunking")
RLOO = ("compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage")


@pytest.fixture(scope="module")
def verl(stand_in):
    stand_in("ray", "peft", "torchdata", "codetiming", "hydra", "pylatexenc", "prefix_grouper")
    return importlib.import_module("verl")


@pytest.fixture(scope="module")
def functional(verl):
    return importlib.import_module("verl.utils.torch_functional")


@pytest.fixture(scope="module")
def algorithms(verl):
    return importlib.import_module("verl.trainer.ppo.core_algos")


def test_version(verl, tested_version):
    assert version("verl") == tested_version("verl")


@pytest.mark.parametrize("name", LOGPROBS)
def test_log_probs(functional, rows, assert_same, name):
    logits, labels = rows
    original, replacement = getattr(functional, name), getattr(ours, name)
    assert original is not replacement
    assert_same(lambda z: replacement(z, labels), lambda z: original(z, labels), logits)


def test_in_place_backward_is_asked_for_as_verl_asks(rows):
    """True by default: the gradient lies over the logits; False keeps them; so does a leaf of the graph."""
    logits, labels = rows
    for inplace in (True, False):
        inner = logits * 1.0
        kept = inner.detach().clone()
        ours.logprobs_from_logits(inner, labels, inplace_backward=inplace).sum().backward()
        assert torch.equal(inner.detach(), kept) is not inplace
    kept = logits.detach().clone()
    ours.logprobs_from_logits(logits, labels).sum().backward()
    assert torch.equal(logits.detach(), kept)


@pytest.mark.parametrize("name", ENTROPIES)
def test_entropy(functional, rows, assert_same, name):
    logits = rows[0].flatten(0, 1)
    assert_same(getattr(ours, name), getattr(functional, name), logits)


@pytest.mark.parametrize("name", RLOO)
def test_rloo(algorithms, name):
    """Prompts of four, three and one response, out of order, named by strings as verl's uids are."""
    index = np.array(["b", "a", "c", "a", "b", "a", "b", "a"], dtype=object)
    mask = torch.arange(6) < torch.tensor([6, 3, 4, 1, 5, 2, 6, 0])[:, None]
    rewards = torch.randn(8, 6) * mask
    original, replacement = getattr(algorithms, name), getattr(ours, name)
    kept = rewards.clone()
    got = replacement(rewards, mask.float(), index)
    want = original(rewards.clone(), mask.float(), index)
    assert torch.equal(rewards, kept)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert got[0].abs().sum() > 0


def test_engines_and_registry_get_them_and_lose_them(functional, algorithms):
    prefix = importlib.import_module("verl.trainer.ppo.prefix_grouper_utils")
    registry = dict(algorithms.ADV_ESTIMATOR_REGISTRY)
    before = [getattr(functional, name) for name in LOGPROBS + ENTROPIES]
    ours.patch(replace_fused=True)
    ours.patch(replace_fused=True)
    assert [getattr(functional, name) for name in LOGPROBS + ENTROPIES] == [
        getattr(ours, name) for name in LOGPROBS + ENTROPIES
    ]
    assert prefix.logprobs_from_logits is ours.logprobs_from_logits
    assert algorithms.get_adv_estimator_fn("rloo") is ours.compute_rloo_outcome_advantage
    assert algorithms.get_adv_estimator_fn("rloo_vectorized") is ours.compute_rloo_vectorized_outcome_advantage
    changed = [key for key, value in algorithms.ADV_ESTIMATOR_REGISTRY.items() if registry[key] is not value]
    assert len(changed) == 2
    ours.unpatch()
    assert [getattr(functional, name) for name in LOGPROBS + ENTROPIES] == before
    assert prefix.logprobs_from_logits is before[0]
    assert registry == algorithms.ADV_ESTIMATOR_REGISTRY


def test_whitening_is_that_of_the_recipe(functional):
    """The recipe's advantages are whitened by this function of verl's; ours by rloo_advantages."""
    mask = torch.arange(5) < torch.tensor([5, 3, 4, 1])[:, None]
    scores, acc = torch.randn(4, 5), torch.tensor([1.0, 0.0, 1.0, 1.0])

    data = SimpleNamespace(batch={"rm_scores": scores, "acc": acc})
    config = SimpleNamespace(algorithm=SimpleNamespace(reward_dpo_coef=5.0, reward_gt_coef=2.0))
    advantages, returns = ours.compute_rloo_advantage_return(data, mask, 2, config)
    want = functional.masked_whiten(returns, mask.float()) * mask
    torch.testing.assert_close(advantages, want, atol=1e-5, rtol=1e-5)


def test_page(verl):
    run_page(ROOT / "docs" / "verl.md")
