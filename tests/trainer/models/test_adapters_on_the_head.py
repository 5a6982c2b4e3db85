"""An adapter on the head: its products are further columns of one head, and a tied embedding stays as it is."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

import prime_kernels as pk
from prime_trainer.config.needs import needs_of
from prime_trainer.config.sections import (
    AdapterConfig,
    AlgorithmConfig,
    ModelConfig,
    PolicyConfig,
    PRMConfig,
    RolloutConfig,
    ScaleConfig,
)
from prime_trainer.models import lm_head, loading, placement, tokenizers
from prime_trainer.models.adapters.views import adapted
from prime_trainer.models.forward import hidden_states
from prime_trainer.models.model_files import ModelError
from prime_trainer.train.trainable import Trainable

pytest.importorskip("peft", reason="peft is not installed: pip install 'prime-process-rewards[adapters]'")
IDS = torch.tensor([[5, 80, 33, 7, 120, 9]])
WANTED = torch.tensor([1, 7, 0, 90, 4, 33])
ADAPTER = {"rank": 4, "alpha": 8, "targets": ["all-linear", "lm_head"]}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def directory(request, model_dir, tmp_path_factory):
    return model_dir if request.param else tiny.write_model(tmp_path_factory.mktemp("untied"), tied=False)


def config(directory, dtype="float32", **adapter):
    return ModelConfig(path=str(directory), dtype=dtype, device="cpu", adapter=adapter or ADAPTER)


def make(directory, dtype="float32"):
    """A base with the adapters of policy and PRM."""
    cfg = config(directory, dtype)
    base = placement.load_base(cfg)
    return base, *(placement.put_adapter(base, name, cfg, seed) for seed, name in enumerate(("policy", "prm")))


def stirred(view):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for factors in view.factors().values():
            for each in (factors.a, factors.b):
                each.copy_(0.3 * torch.randn(each.shape, generator=generator))
    return view


def log_probs(model):
    return lm_head.log_probs(model, hidden_states(model, IDS, None, None)[0], WANTED)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_give_equal_bits(directory, dtype):
    base, policy, prm = make(directory, dtype)
    with torch.no_grad():
        plain, found = log_probs(base.view(None)), log_probs(policy)
        assert torch.equal(found, plain) and torch.equal(log_probs(prm), plain)
        stirred(prm)
        assert torch.equal(log_probs(policy), plain) and not torch.equal(log_probs(prm), plain)
        untouched = log_probs(tiny.load(directory, dtype))
    torch.testing.assert_close(plain, untouched, rtol=1e-6, atol=1e-6)


def test_values_and_gradients_are_those_of_peft(directory):
    """Of logits made by peft's own forward pass; the losses take the head's parameters instead."""
    _, policy, _ = make(directory)
    stirred(policy)
    factors = policy.factors()
    assert policy.base.head in factors and len(factors) == 15
    columns = [each for f in factors.values() for each in (f.a, f.b)]
    logits = policy(input_ids=IDS).logits[0]
    wanted = logits.log_softmax(-1).gather(1, WANTED[:, None]).squeeze(1)
    upstream = torch.linspace(-1, 1, len(WANTED))
    gradients = torch.autograd.grad(wanted, columns, upstream)
    found = log_probs(policy)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    for mine, of_peft in zip(torch.autograd.grad(found, columns, upstream), gradients, strict=True):
        torch.testing.assert_close(mine, of_peft, rtol=1e-4, atol=1e-5)
    head = lm_head.head(policy, hidden_states(policy, IDS, None, None)[0])
    loss = pk.linear_nll(head.hidden, head.weight, WANTED, bias=head.bias, **lm_head.options(policy))
    torch.testing.assert_close(loss, -wanted.mean(), rtol=1e-5, atol=1e-5)
    f = factors[policy.base.head]
    of_a, of_b = torch.autograd.grad(loss, [f.a, f.b])
    by_peft = torch.autograd.grad(-policy(input_ids=IDS).logits[0].log_softmax(-1)[range(6), WANTED].mean(), [f.a, f.b])
    torch.testing.assert_close((of_a, of_b), by_peft, rtol=1e-4, atol=1e-6)


def test_adapters_of_two_ranks(directory):
    """A view's head has the columns of the wider one; what is beyond its own is zero."""
    base, policy, _ = make(directory)
    wide = base.add("wide", placement.lora_config(AdapterConfig(rank=7, targets=["lm_head"])), 5)
    stirred(policy), stirred(wide)
    for view in (policy, wide):
        logits = view(input_ids=IDS).logits[0]
        assert lm_head.head(view, hidden_states(view, IDS, None, None)[0]).weight.shape[1] == 64 + 7
        wanted = logits.log_softmax(-1).gather(1, WANTED[:, None]).squeeze(1)
        torch.testing.assert_close(log_probs(view), wanted, rtol=1e-5, atol=1e-5)


def test_sampling_has_the_logits_of_the_losses(directory):
    _, policy, _ = make(directory, "bfloat16")
    stirred(policy)
    with torch.no_grad(), lm_head.same_logits(policy):
        logits = policy(input_ids=IDS).logits[0]
    assert logits.dtype == torch.float32
    with torch.no_grad():
        found = log_probs(policy)
    torch.testing.assert_close(
        logits.log_softmax(-1).gather(1, WANTED[:, None]).squeeze(1), found, rtol=1e-5, atol=1e-5
    )


def test_a_step_leaves_the_embedding_and_what_is_saved_has_both(directory, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, policy, _ = make(directory)
    stirred(policy)
    before = {name: value.clone() for name, value in base.view(None).state_dict().items()}
    f = policy.factors()[base.head]
    b = f.b.clone()
    trained = Trainable(policy, lr=1e-2, grad_clip=1.0)
    log_probs(policy).sum().backward()
    trained.step()
    assert not torch.equal(f.b, b)
    after = base.view(None).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    loading.save(policy, tokenizers.load_tokenizer(config(directory)), tmp_path / "final")
    wanted = policy(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(merged.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "final" / "config.json").read_text())["tie_word_embeddings"] is False
    own = tmp_path / "final" / "adapter"
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(directory), own)
    torch.testing.assert_close(by_peft(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    again = placement.load_used(config(directory, path=own))
    assert adapted(again).base.head == base.head and torch.equal(again(input_ids=IDS).logits, wanted)


def test_a_model_in_shards_is_refused(model_dir):
    cfg = config(model_dir)
    needs = needs_of(PolicyConfig(), PRMConfig(), AlgorithmConfig(), RolloutConfig(engine="transformers"))
    wanted = placement.Wanted(cfg, cfg, PRMConfig(), ScaleConfig(), needs, 0)
    with pytest.raises(ModelError, match="targets has the head, which FSDP2 keeps apart"):
        placement.load_models(wanted, SimpleNamespace(mesh=object()), None)
