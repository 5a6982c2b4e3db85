"""The functions that replace OpenRLHF's give what OpenRLHF's give, and its actor gets them."""

import importlib
from importlib.metadata import version

import pytest
import torch
from conftest import ROOT
from helpers.support import run_page

from prime_kernels.integrations import openrlhf as ours

pytest.importorskip("openrlhf", reason="openrlhf is not installed: make test-integrations has it")
STOOD_IN = ("deepspeed", "peft", "flash_attn", "optimum", "pylatexenc", "ray", "torchdata", "einops", "jsonlines")


@pytest.fixture(scope="module")
def utils(stand_in):
    stand_in(*STOOD_IN)
    return importlib.import_module("openrlhf.models.utils")


@pytest.fixture
def patched(utils):
    ours.patch(replace_fused=True)
    yield utils
    ours.unpatch()


def test_version(utils, tested_version):
    assert version("openrlhf") == tested_version("openrlhf")


def original_log_probs(utils, monkeypatch):
    """Without flash-attn, which the stand-in would pretend to be."""
    monkeypatch.setitem(__import__("sys").modules, "flash_attn.ops.triton.cross_entropy", None)
    return utils.log_probs_from_logits


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs(utils, rows, assert_same, monkeypatch, temperature):
    logits, labels = rows
    original = original_log_probs(utils, monkeypatch)
    assert original is not ours.log_probs_from_logits
    assert_same(
        lambda z: ours.log_probs_from_logits(z, labels, temperature),
        lambda z: original(z, labels, temperature=temperature),
        logits,
    )


def test_sixteen_bits_are_not_rounded(utils, rows, monkeypatch):
    logits, labels = rows[0].detach().bfloat16(), rows[1]
    want = original_log_probs(utils, monkeypatch)(logits.float(), labels)
    torch.testing.assert_close(ours.log_probs_from_logits(logits, labels), want, atol=2e-5, rtol=1e-5)


def test_entropy(utils, rows, assert_same):
    assert_same(ours.compute_entropy, utils.compute_entropy, rows[0])


def test_actor_gets_them_and_loses_them(utils):
    actor = importlib.import_module("openrlhf.models.actor")
    before = (utils.log_probs_from_logits, utils.compute_entropy)
    ours.patch(replace_fused=True)
    ours.patch(replace_fused=True)
    for module in (utils, actor):
        assert module.log_probs_from_logits is ours.log_probs_from_logits
        assert module.compute_entropy is ours.compute_entropy
    ours.unpatch()
    for module in (utils, actor):
        assert (module.log_probs_from_logits, module.compute_entropy) == before


def test_actor_forward(patched, tmp_path):
    """The actor itself, on a tiny model: its action log-probs and entropies are those of its logits."""
    from helpers.tiny import write_model
    from transformers import AutoModelForCausalLM

    actor_module = importlib.import_module("openrlhf.models.actor")
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path), dtype=torch.float32)
    actor = actor_module.Actor(model, temperature=0.8)
    actor.packing_samples = False  # which it sets for itself only where it loads the model
    ids, attention = torch.randint(3, 301, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask = torch.ones(2, 4)
    logp, output = actor(ids, mask, attention_mask=attention, return_output=True, return_entropy=True)
    log_p = (model(ids).logits.float() / 0.8).log_softmax(-1)
    want = log_p[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logp, want[:, -4:], atol=2e-5, rtol=1e-5)
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    torch.testing.assert_close(output.entropy, entropy, atol=2e-5, rtol=1e-5)


def test_page(utils):
    run_page(ROOT / "docs" / "openrlhf.md")
