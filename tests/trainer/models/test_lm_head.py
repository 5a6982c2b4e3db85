"""The head as the losses take it: float32 logits or rounded ones, and a model's own logits like these."""

import pytest
import torch
import transformers
from helpers import tiny

import prime_kernels as pk
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import lm_head, loading


@pytest.mark.parametrize("given", ["auto", "input"])
def test_log_probs_of_a_bfloat16_model(tmp_path, given):
    path = tiny.write_model(tmp_path)
    model = loading.load_model(ModelConfig(path=str(path), dtype="bfloat16", device="cpu", logits_dtype=given))
    weight = model.get_output_embeddings().weight
    hidden = (40 * torch.randn(50, weight.shape[1])).bfloat16()
    ids = torch.randint(len(weight), (50,))
    with torch.no_grad():
        found, _ = lm_head.log_probs(model, hidden, ids)
    exact = hidden.double() @ weight.double().T
    rounded = exact.float().bfloat16()
    wants = {"auto": exact, "input": rounded.double()}
    errors = {
        name: (found.double() - z.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)).abs()
        for name, z in wants.items()
    }
    # A sum on the border between two bfloat16 numbers may be rounded either way.
    assert errors[given].median() < 1e-5 < 1e-3 < errors[{"auto": "input", "input": "auto"}[given]].max()
    head = lm_head.head(model, hidden)
    nll = pk.linear_nll(head.hidden, head.weight, ids, **lm_head.options(model))
    torch.testing.assert_close(nll, -found.mean())


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Llama", {}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Gemma2", {"final_logit_softcapping": 3.0, "head_dim": 16}),
        ("Phi", {}),
    ],
    ids=["plain", "scaled", "capped", "with a bias"],
)
def test_a_models_own_logits_are_those_of_the_losses(tmp_path, kind, settings):
    """Factor and cap work on float32 sums; afterwards the model rounds again."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, pad_token_id=0, **settings,
    )  # fmt: skip
    low = getattr(transformers, f"{kind}ForCausalLM")(config).bfloat16().eval()
    if kind == "Phi":
        torch.nn.init.normal_(low.lm_head.bias)
    ids = torch.randint(97, (3, 9))
    with torch.no_grad():
        before = low(input_ids=ids).logits
        with lm_head.same_logits(low):
            logits = low(input_ids=ids).logits
        after = low(input_ids=ids).logits
        head = lm_head.head(low, low.base_model(input_ids=ids).last_hidden_state)
    exact = head.hidden.double() @ head.weight.double().T + (0 if head.bias is None else head.bias.double())
    exact = head.scale * exact
    if head.softcap is not None:
        exact = head.softcap * torch.tanh(exact / head.softcap)
    assert logits.dtype == torch.float32 and (logits - exact).abs().max() < 1e-5
    assert before.dtype == torch.bfloat16 and torch.equal(before, after) and (before - exact).abs().max() > 4e-4
    low.logits_dtype = "input"
    with torch.no_grad(), lm_head.same_logits(low):
        assert torch.equal(low(input_ids=ids).logits, before)
