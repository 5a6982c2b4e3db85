"""The head as the losses take it: float32 logits, or rounded ones where the engine that samples rounds."""

import pytest
import torch
from helpers import tiny

import prime_kernels as pk
from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import lm_head, loading


@pytest.mark.parametrize(
    ("engine", "dtype", "given", "resolved"),
    [
        ("transformers", "bfloat16", "auto", "float32"),
        ("vllm-server", "bfloat16", "auto", "input"),
        ("vllm-server", "float32", "auto", "float32"),
        ("vllm-server", "bfloat16", "float32", "float32"),
        ("transformers", "bfloat16", "input", "input"),
    ],
)
def test_what_auto_stands_for(engine, dtype, given, resolved):
    cfg = RunConfig(rollout={"engine": engine}, model={"dtype": dtype, "logits_dtype": given})
    assert cfg.logits_dtype == resolved
    assert cfg.model.logits_dtype == given  # the file of a run says what was asked for


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
