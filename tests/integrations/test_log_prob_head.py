"""LogProbHead: what the model's logits say, without them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers.support import assert_close

from prime_kernels.integrations import CausalHead, LogProbHead

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


def test_logits_are_rounded_where_asked(model):
    """To the dtype of the hidden states, as the model's own head rounds them."""
    low, ids = copy.deepcopy(model).to(torch.bfloat16), torch.randint(211, (2, 9))
    with torch.no_grad():
        hidden = low.model(input_ids=ids).last_hidden_state[:, :-1]
        exact = hidden.double() @ low.lm_head.weight.double().T
        for option, logits in (("float32", exact), ("input", exact.bfloat16().double())):
            want = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
            # Of sums in another order a few lie on the other side of a rounding; so do few tokens.
            off = (LogProbHead(low, logits_dtype=option)(ids) - want).abs()
            assert off.median() < 1e-5, option
    assert (exact.bfloat16().double() - exact).abs().max() > 1e-3
    with pytest.raises(ValueError, match='logits_dtype: expected "float32" or "input", got \'bfloat16\''):
        LogProbHead(model, logits_dtype="bfloat16")


def test_parameters_are_those_of_the_model(model):
    head = LogProbHead(model)
    assert {id(each) for each in head.parameters()} == {id(each) for each in model.parameters()}


SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "Granite divides": ("Granite", {"logits_scaling": 4.0}, CausalHead(0.25)),
    "HyperCLOVA X multiplies": ("HyperCLOVAX", {"logits_scaling": 4.0}, CausalHead(4.0)),
    "Cohere": ("Cohere", {"logit_scale": 0.0625}, CausalHead(0.0625)),
    "Gemma 2 caps": ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 16}, CausalHead(1.0, 30.0)),
    "a factor that is of no effect": ("Llama", {"logit_scale": 0.5}, CausalHead()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scaled_and_capped_models_are_scored_as_they_score_themselves(kind):
    name, settings, head = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    model, ids = getattr(transformers, f"{name}ForCausalLM")(config).eval(), torch.randint(97, (2, 5))
    found = LogProbHead(model, temperature=0.5, with_entropy=True)
    assert found.head == head
    for got, want in zip(found(ids), exact(model, ids, None, 0.5), strict=True):
        assert_close("logp", got, want, extent=32.0)


def test_padding_on_the_left_predicts_nothing(model):
    ids, attention = torch.randint(211, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    attention[1, :3] = 0
    got = LogProbHead(model)(ids, attention, position_ids=(attention.cumsum(1) - 1).clamp_min(0))
    assert got[1, :3].abs().sum() == 0
    alone = LogProbHead(model)(ids[1:, 3:])
    assert_close("logp", got[1, 3:], alone[0], extent=32.0)


class Adapter(torch.nn.Module):
    """As peft wraps a layer: B is zero at first, so that no probe could tell."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.lora_A = torch.nn.Linear(layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, layer.out_features, bias=False)
        torch.nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def test_an_output_layer_that_is_more_than_a_matrix():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).eval()
    model.lm_head = Adapter(model.lm_head)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM's output layer to be a matrix .* lora_A\.weight"):
        LogProbHead(model)


def test_a_head_with_layers_of_its_own():
    config = transformers.BertConfig(**SMALL | {"is_decoder": True})
    with pytest.raises(ValueError, match=r"BertLMHeadModel's logits are not those of .* differ by .* of the largest"):
        LogProbHead(transformers.BertLMHeadModel(config).eval())


def test_the_probe_leaves_the_model_as_it_was(model):
    model.train()
    model.model.layers[0].eval()
    modes, state = [module.training for module in model.modules()], torch.random.get_rng_state()
    LogProbHead(model)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.lm_head._forward_hooks
    model.eval()


def test_what_it_refuses(model):
    with pytest.raises(TypeError, match=r"model: expected a Hugging Face causal language model .* got Linear"):
        LogProbHead(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got LlamaModel"):
        LogProbHead(model.model)
    with pytest.raises(ValueError, match="temperature: expected a finite number"):
        LogProbHead(model, temperature=0.0)
    with pytest.raises(TypeError, match="with_entropy: expected True or False"):
        LogProbHead(model, with_entropy=1)
    head = LogProbHead.__new__(LogProbHead)
    torch.nn.Module.__init__(head)
    head.temperature, head.with_entropy = 1.0, False
    head.model = SimpleNamespace(base_model=lambda **_: SimpleNamespace(logits=1))
    with pytest.raises(TypeError, match="last_hidden_state"):
        head(torch.zeros(1, 2, dtype=torch.long))
