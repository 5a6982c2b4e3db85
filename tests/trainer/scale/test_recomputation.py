"""What `activation_checkpointing` recomputes: less is kept, values and gradients have the same bits."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1MLP
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3MLP

from prime_trainer.scale import recomputation

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("zoo", ROOT / "bench" / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = zoo
spec.loader.exec_module(zoo)


def passes(name, what):
    """Hidden states, what the pass keeps for its backward, in bytes, and the gradients."""
    torch.manual_seed(0)
    model = recomputation.recompute_activations(zoo.build(name, zoo.names()[name]), what)
    parameters = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    ids = torch.arange(3, 35).view(1, -1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    grads = torch.autograd.grad(hidden, list(model.parameters()), upstream, allow_unused=True)
    return hidden, sum(size for size, _ in kept.values()), grads


@pytest.mark.parametrize(
    ("name", "share"), [("llama", 0.67), ("qwen3", 0.64), ("gemma2", 0.74), ("phi3", 0.87), ("gpt2", 1.0)]
)
def test_selective_keeps_less_and_changes_no_bit(name, share):
    """phi3 has both branches of its MLP as one product; gpt2 has none, and the normalisation of PyTorch."""
    hidden, kept, grads = passes(name, "none")
    same, less, others = passes(name, "selective")
    assert torch.equal(hidden, same)
    for one, other in zip(grads, others, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))
    assert less / kept == pytest.approx(share, abs=0.01)


def test_an_mlp_that_computes_more_is_left_alone():
    """Falcon-H1 multiplies both branches by constants of its configuration."""
    assert recomputation._computes_gated(LlamaMLP)
    assert not recomputation._computes_gated(FalconH1MLP) and not recomputation._computes_gated(Phi3MLP)

    class Scaled(nn.Module):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.5

    assert not recomputation._computes_gated(Scaled)


def test_nothing_is_recorded_without_gradients(monkeypatch):
    model = recomputation.recompute_activations(zoo.build("llama", zoo.names()["llama"]), "selective")
    monkeypatch.setattr(recomputation, "checkpoint", None)
    with torch.no_grad():
        model.base_model(input_ids=torch.arange(3, 9).view(1, -1))
