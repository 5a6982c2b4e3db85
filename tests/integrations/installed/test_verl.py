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


@pytest.fixture
def patched(verl):
    ours.patch()
    yield importlib.import_module("verl.utils.experimental.torch_functional")
    ours.unpatch()


HEAD_SHAPES = {"packed": (17,), "padded": (2, 9)}


@pytest.mark.parametrize("outputs", ["log_probs", "entropy", "both"])
@pytest.mark.parametrize("shape", HEAD_SHAPES)
def test_head(patched, shape, outputs):
    """Values, and gradients of each output alone and of both, are those of verl's torch backend."""
    leading, temperature = HEAD_SHAPES[shape], 0.7
    ids = torch.randint(211, leading)
    inputs = torch.randn(*leading, 24), torch.randn(211, 24) * 0.5
    weights = {"log_probs": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (1.0, 0.5)}[outputs]
    factors = torch.randn(2, *leading)
    found = []
    for backend in (ours.BACKEND, "torch"):
        hidden, weight = (each.clone().requires_grad_() for each in inputs)
        head = patched.FusedLinearForPPO(chunk_size=4, impl_backend=backend)
        logp, entropy = head(hidden, weight, ids.to(torch.int32), temperature)
        assert logp.shape == entropy.shape == leading
        kept = [(w * f * z).sum() for w, f, z in zip(weights, factors, (logp, entropy), strict=True) if w]
        sum(kept).backward()
        found.append((logp, entropy, hidden.grad, weight.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=3e-5, rtol=1e-4)
        assert want.abs().sum() > 0


def test_head_in_bfloat16_is_nearer_than_the_torch_backend(patched):
    """float32 logits, or rounded where patch() says so, as verl's are."""
    hidden, weight, ids = torch.randn(64, 32).bfloat16(), torch.randn(211, 32).bfloat16(), torch.randint(211, (64,))
    exact = (hidden.double() @ weight.double().T).log_softmax(-1)
    logp = exact.gather(-1, ids[:, None])[:, 0]
    entropy = -(exact.exp() * exact).sum(-1)

    def errors(backend):
        got = patched.FusedLinearForPPO(impl_backend=backend)(hidden, weight, ids)
        return [(mine - want).abs().max().item() for mine, want in zip(got, (logp, entropy), strict=True)]

    mine, theirs = errors(ours.BACKEND), errors("torch")
    assert all(one < 1e-4 < other / 10 for one, other in zip(mine, theirs, strict=True)), (mine, theirs)
    ours.patch(logits_dtype="input")
    rounded = errors(ours.BACKEND)
    ours.patch()
    assert 1e-3 < rounded[0] <= 2 * theirs[0]
    with pytest.raises(ValueError, match="logits_dtype: expected"):
        ours.patch(logits_dtype="bfloat16")


def test_head_is_chosen_by_name_alone(patched, monkeypatch):
    """Every other name means what it means to verl, torch by default; unpatched, ours is unknown."""
    monkeypatch.setattr(ours, "head_log_probs", lambda *_, **__: pytest.fail("not chosen"))
    hidden, weight, ids = torch.randn(5, 8), torch.randn(31, 8), torch.randint(31, (5,))
    for head in (patched.FusedLinearForPPO(), patched.FusedLinearForPPO(64), patched.FusedLinearForPPO(64, "liger")):
        assert head(hidden, weight, ids)[0].shape == (5,)
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: other"):
        patched.FusedLinearForPPO(impl_backend="other")
    ours.unpatch()
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend: prime_kernels"):
        patched.FusedLinearForPPO(impl_backend=ours.BACKEND)


def test_head_in_a_model(patched, monkeypatch, tmp_path):
    """By verl's own function that gives a model its fused forward: log-probs and entropies are those of its logits."""
    from helpers.tiny import write_model
    from transformers import AutoModelForCausalLM

    choice = importlib.import_module("verl.models.transformers.monkey_patch")
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path), dtype=torch.float32)
    ids = torch.randint(3, 301, (2, 9))
    logits = model(ids).logits / 0.8
    monkeypatch.setattr(type(model), "forward", type(model).forward)
    ours.patch()  # the module that chooses was imported after the first
    choice.patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=ours.BACKEND)
    assert model._verl_fused_kernels_backend == ours.BACKEND
    called = []
    original = ours.head_log_probs
    monkeypatch.setattr(ours, "head_log_probs", lambda *a, **k: called.append(1) or original(*a, **k))
    output = model(input_ids=ids, temperature=0.8, return_dict=True)
    assert called
    log_p = logits.log_softmax(-1)
    want = log_p.gather(-1, ids.roll(-1, -1)[..., None])[..., 0]
    torch.testing.assert_close(output.log_probs, want, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output.entropy, -(log_p.exp() * log_p).sum(-1), atol=2e-5, rtol=1e-5)
    grads = []
    for loss in (output.log_probs.sum() + output.entropy.sum(), want.sum() - (log_p.exp() * log_p).sum()):
        model.zero_grad()
        loss.backward()
        grads.append({name: each.grad.clone() for name, each in model.named_parameters()})
    for name, grad in grads[1].items():
        torch.testing.assert_close(grads[0][name], grad, atol=1e-4, rtol=1e-3)


def test_page(verl):
    run_page(ROOT / "docs" / "verl.md")
