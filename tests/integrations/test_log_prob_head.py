"""LogProbHead: what the model's logits say, without them."""

from types import SimpleNamespace

import pytest
import torch
from helpers.support import assert_close

from prime_kernels.integrations import LogProbHead

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[train]'")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=211,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def exact(model, ids, attention, temperature=1.0):
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1].double() / temperature
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, ids[:, 1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def test_values_and_gradients(model):
    ids, attention = torch.randint(211, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    attention[1, 5:] = 0
    valid = attention[:, 1:].bool()
    logp, entropy = LogProbHead(model, temperature=0.8, with_entropy=True)(ids, attention)
    want = exact(model, ids, attention, 0.8)
    for got, expected in zip((logp, entropy), want, strict=True):
        assert got.dtype == torch.float32 and got[1, 4:].abs().sum() == 0
        assert_close("logp", got[valid], expected[valid], extent=32.0)
    weights = torch.randn(3, 6) * valid
    parameters = dict(model.named_parameters())
    mine = torch.autograd.grad((logp * weights).sum(), parameters.values())
    theirs = torch.autograd.grad((want[0] * weights).sum(), parameters.values())
    for name, one, other in zip(parameters, mine, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")
    assert mine[0].abs().sum() > 0


def test_labels(model):
    ids = torch.randint(211, (2, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    got = LogProbHead(model)(ids, labels=labels)
    want = exact(model, ids, None)[0]
    assert got[:, :2].abs().sum() == 0
    assert_close("logp", got[:, 2:], want[:, 2:], extent=32.0)


def test_parameters_are_those_of_the_model(model):
    head = LogProbHead(model)
    assert {id(each) for each in head.parameters()} == {id(each) for each in model.parameters()}


@pytest.mark.parametrize(
    "settings, factor",
    [
        ({"logit_scale": 0.0625}, 0.0625),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
        ({"logit_scale": None}, 1.0),
    ],
)
def test_scaled_logits_are_a_temperature(model, monkeypatch, settings, factor):
    for name, value in settings.items():
        monkeypatch.setattr(model.config, name, value, raising=False)
    assert LogProbHead(model, temperature=2.0).temperature == pytest.approx(2.0 / factor)


def test_granite_is_scored_as_it_scores_itself():
    config = transformers.GraniteConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, logits_scaling=4.0, initializer_range=0.3,
    )  # fmt: skip
    granite, ids = transformers.GraniteForCausalLM(config).eval(), torch.randint(97, (2, 5))
    assert_close("logp", LogProbHead(granite)(ids), exact(granite, ids, None)[0], extent=32.0)


def test_what_it_refuses(model, monkeypatch):
    with pytest.raises(TypeError, match=r"model: expected a Hugging Face causal language model .* got Linear"):
        LogProbHead(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got LlamaModel"):
        LogProbHead(model.model)
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        LogProbHead(model, temperature=0.0)
    with pytest.raises(TypeError, match="with_entropy: expected True or False"):
        LogProbHead(model, with_entropy=1)
    monkeypatch.setattr(model.config, "logit_scale", -1.0, raising=False)
    with pytest.raises(ValueError, match="factor above 0, got -1"):
        LogProbHead(model)
    monkeypatch.setattr(model.config, "final_logit_softcapping", 30.0, raising=False)
    with pytest.raises(ValueError, match="got final_logit_softcapping"):
        LogProbHead(model)
    head = LogProbHead.__new__(LogProbHead)
    torch.nn.Module.__init__(head)
    head.temperature, head.with_entropy = 1.0, False
    head.model = SimpleNamespace(base_model=lambda **_: SimpleNamespace(logits=1))
    with pytest.raises(TypeError, match="last_hidden_state"):
        head(torch.zeros(1, 2, dtype=torch.long))
