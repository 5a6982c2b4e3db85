"""Adapters on one base: what a pass through each view computes, which parameters learn, and what is written."""

import json

import pytest
import torch
from helpers import tiny

from prime_trainer.config.load import load
from prime_trainer.config.sections import AdapterConfig, ModelConfig
from prime_trainer.models import lm_head, loading, placement, tokenizers
from prime_trainer.models.adapters import files as adapter_files
from prime_trainer.models.adapters.views import MergedWeights, adapted, lora_config
from prime_trainer.models.forward import hidden_states
from prime_trainer.models.model_files import ModelError
from prime_trainer.train.trainable import Trainable

IDS = torch.tensor([[5, 80, 33, 7, 120, 9]])


@pytest.fixture
def make_base(model_dir):
    def make(dtype="float32", adapter=None, directory=model_dir):
        cfg = ModelConfig(path=str(directory), dtype=dtype, device="cpu", adapter=adapter or {"rank": 4, "alpha": 8})
        return placement.load_base(cfg), cfg

    return make


def stirred(view, seed=0, size=0.3):
    """The adapter with weights that show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in view.factors().values():
            for each in (factors.a, factors.b):
                each.copy_(size * torch.randn(each.shape, generator=generator))
    return view


def hidden(model):
    return hidden_states(model, IDS, None, None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_adapter_changes_no_bit(make_base, model_dir, dtype):
    base, cfg = make_base(dtype)
    policy, prm = (placement.put_adapter(base, name, cfg, 0) for name in ("policy", "prm"))
    plain = hidden(tiny.load(model_dir, dtype))
    for view in (policy, prm, base.view(None)):
        assert torch.equal(hidden(view), plain)
    stirred(prm)
    assert torch.equal(hidden(policy), plain) and torch.equal(hidden(base.view(None)), plain)
    assert not torch.equal(hidden(prm), plain)


def test_a_pass_is_that_of_the_formula(make_base, model_dir):
    """W + alpha / rank * B A in every layer, by hand in a plain model."""
    base, cfg = make_base()
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    plain = tiny.load(model_dir)
    weights = dict(plain.named_parameters())
    factors = view.factors()
    assert len(factors) == 2 * 7 and all(f.a.shape[0] == 4 and f.scaling == 2.0 for f in factors.values())
    with torch.no_grad():
        for name, each in factors.items():
            weights[name] += 2.0 * each.b @ each.a
    torch.testing.assert_close(hidden(view), hidden(plain), rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_adapter_of_the_pass_alone(make_base):
    base, cfg = make_base()
    policy, prm = (stirred(placement.put_adapter(base, name, cfg, 0), k) for k, name in enumerate(("policy", "prm")))
    trained = {name: Trainable(view, lr=1e-2, grad_clip=1.0) for name, view in (("policy", policy), ("prm", prm))}
    assert [len(each.params) for each in trained.values()] == [28, 28]
    assert sum(len(each.optimizer.state) for each in trained.values()) == 56
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    for name, view in (("policy", policy), ("prm", prm), ("policy", policy)):
        at = lm_head.head(view, hidden(view).flatten(0, 1))
        (at.hidden @ at.weight.t()).logsumexp(-1).sum().backward()
        other = "prm" if name == "policy" else "policy"
        assert all(m.grad is not None for m in trained[name].master)
        assert all(m.grad is None for m in trained[other].master)
        assert trained[name].step() > 0
    after = base.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".lora_" in name} and len(changed) == 56


def test_gradients_are_those_of_the_merged_weights(make_base, model_dir):
    """dA = s B^T dW and dB = s dW A^T."""
    base, cfg = make_base()
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    merged = tiny.load(model_dir)
    merged.load_state_dict(dict(loading.pairs(loading.named_tensors(view))))
    hidden(merged).square().sum().backward()
    hidden(view).square().sum().backward()
    full = dict(merged.named_parameters())
    for name, f in view.factors().items():
        wanted = full[name].grad
        torch.testing.assert_close(f.a.grad, 2.0 * f.b.T @ wanted, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(f.b.grad, 2.0 * wanted @ f.a.T, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 2**-7)])
def test_merging_is_in_float32(make_base, dtype, error):
    """Each weight is one of the two neighbours of the exact sum, and on average the sum."""
    base, cfg = make_base(dtype)
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    merged, plain = loading.named_tensors(view), view.state_dict()
    assert isinstance(merged, MergedWeights) and merged.keys() == loading.weight_shapes(view).keys() == plain.keys()
    for name, factors in view.factors().items():
        exact = plain[name].double() + 2.0 * factors.b.double() @ factors.a.double()
        assert merged[name].dtype == plain[name].dtype
        apart = merged[name].double() - exact
        assert (apart.abs() <= error * exact.abs() + 1e-6).all()
        # Three standard deviations of a mean of errors of a unit at most; float32 is rounded to nearest.
        assert dtype == "float32" or abs((apart / exact.abs()).mean()) <= 3 * error / (3 * apart.numel()) ** 0.5
    assert merged["model.embed_tokens.weight"] is not None and not base.view(None).factors()


def test_what_is_saved_is_read_alike_by_peft_and_by_transformers(make_base, model_dir, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, cfg = make_base()
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    loading.save(view, tokenizers.load_tokenizer(cfg), tmp_path / "final", beside={"prm.json": {"beta": 1}})
    wanted = view(input_ids=IDS).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-4)
    directory = tmp_path / "final" / "adapter"
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), directory)
    torch.testing.assert_close(by_peft(input_ids=IDS).logits, wanted, rtol=1e-6, atol=1e-6)
    assert {path.name for path in directory.iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base.json", "prm.json"
    }  # fmt: skip
    again = placement.load_used(cfg.model_copy(update={"adapter": AdapterConfig(path=directory)}))
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    assert adapted(again).adapter_tensors().keys() == view.adapter_tensors().keys()


def test_layers_that_keep_their_weights_transposed(make_base, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=301, n_positions=64)).save_pretrained(
        tmp_path
    )
    base, cfg = make_base(directory=tmp_path)
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    assert len(view.factors()) == 8 and all(factors.transposed for factors in view.factors().values())
    merged = loading.load_model(cfg)
    assert not torch.allclose(hidden(merged), hidden(view), atol=1e-2)
    merged.load_state_dict(dict(loading.pairs(loading.named_tensors(view))))
    torch.testing.assert_close(hidden(view), hidden(merged), rtol=1e-4, atol=1e-4)


def test_an_adapter_starts_the_same_way_for_one_seed(make_base):
    def start(seed):
        base, cfg = make_base()
        state = torch.get_rng_state()
        view = placement.put_adapter(base, "policy", cfg, seed)
        assert torch.equal(state, torch.get_rng_state())
        return view.adapter_tensors()

    one, same, other = start(1), start(1), start(2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(torch.equal(one[name], other[name]) == ("lora_B" in name) for name in one)


def refused(make_base, message, **adapter):
    base, cfg = make_base(adapter=adapter)
    with pytest.raises(ModelError, match=message):
        placement.put_adapter(base, "policy", cfg, 0)


def test_targets_that_cannot_be(make_base):
    found = r"'qproj' matches no linear layer of LlamaForCausalLM, whose layers are .*q_proj"
    refused(make_base, found, rank=4, targets=["qproj"])
    refused(make_base, found, rank=4, targets=["v_proj", "qproj"])
    refused(make_base, r"rank = 33 is above the width of model.layers.0.self_attn.k_proj, \[32, 64\]", rank=33)
    refused(make_base, "'embed_tokens' matches no linear layer", rank=4, targets=["embed_tokens"])


def test_some_layers_alone(make_base):
    base, cfg = make_base(adapter={"rank": 40, "targets": ["q_proj", "0.mlp.up_proj"]})
    view = placement.put_adapter(base, "policy", cfg, 0)
    assert sorted(view.factors()) == [
        "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    ]  # fmt: skip
    assert all(f.scaling == 1.0 for f in view.factors().values())


def test_a_model_that_peft_cannot_wrap(make_base, monkeypatch):
    import peft

    def refuse(*_):
        raise ValueError("Target module Odd() is not supported")

    monkeypatch.setattr(peft, "inject_adapter_in_model", refuse)
    refused(make_base, "peft cannot put an adapter into LlamaForCausalLM: ValueError: Target module Odd", rank=4)


def test_without_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"needs the package peft: pip install 'prime-process-rewards\[adapters\]'"):
        lora_config(AdapterConfig(rank=4))


def test_a_directory_that_is_no_adapter_of_this_base(make_base, model_dir, tmp_path):
    base, cfg = make_base()
    view = stirred(placement.put_adapter(base, "policy", cfg, 0))
    loading.save(view, tokenizers.load_tokenizer(cfg), tmp_path / "final")
    directory = tmp_path / "final" / "adapter"

    def read(directory, **changes):
        adapter = AdapterConfig(path=directory)
        placement.load_used(cfg.model_copy(update={"adapter": adapter} | changes))

    other = tiny.write_model(tmp_path / "other", tied=False)
    with pytest.raises(ModelError, match=r"was trained on another base than model.path = .*other.*: its base\.json"):
        read(directory, path=str(other))
    (directory / "base.json").unlink()
    narrow = tiny.write_model(tmp_path / "narrow", sizes={"intermediate_size": 96})
    with pytest.raises(ModelError, match="is not of this base: 6 of its tensors"):
        read(directory, path=str(narrow))
    with pytest.raises(ModelError, match=r"it has no adapter_config\.json; its folder adapter is one"):
        read(tmp_path / "final")
    with pytest.raises(ModelError, match="no such directory"):
        read(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"give its base as model\.path and the adapter as model\.adapter\.path"):
        loading.load_model(cfg.model_copy(update={"path": str(directory)}))
    settings = json.loads((directory / adapter_files.CONFIG).read_text())
    for change, message in (({"use_dora": True}, "no plain LoRA: .* sets use_dora"), ({"peft_type": "LOHA"}, "LOHA")):
        (directory / adapter_files.CONFIG).write_text(json.dumps(settings | change))
        with pytest.raises(ModelError, match=message):
            read(directory)


def test_targets_on_the_command_line():
    def targets(*words):
        return load(None, ["--model.adapter.rank", "8", "--model.adapter.targets", *words]).model.adapter.targets

    assert targets("all-linear") == "all-linear" and targets('["q_proj","v_proj"]') == ["q_proj", "v_proj"]


@pytest.mark.parametrize(("given", "message"), [
    ({"alpha": 4}, "rank must be above 0"),
    ({"targets": ["q_proj"]}, "rank must be above 0"),
    ({"rank": 4, "targets": []}, "must be 'all-linear' or names of layers"),
    ({"rank": 4, "path": "x"}, "has its own rank, alpha and targets"),
    ({"rank": -1}, "greater than or equal to 0"),
])  # fmt: skip
def test_settings(given, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**given)
