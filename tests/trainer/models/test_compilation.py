"""Compiled layers give the losses and gradients of eager ones; the backend here makes no code: that takes minutes."""

import pytest
import torch
from helpers import tiny

from prime_trainer.data.groups import Group, Response
from prime_trainer.models import compilation
from prime_trainer.models.attention import interface as attention_interface
from prime_trainer.models.model_files import ModelError
from prime_trainer.scale import recomputation
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def gradients(model, batch):
    """Log-probs of all tokens by passes of several lengths, and what their sum leaves in the parameters."""
    found = []
    for micro in batch.micro_batches(range(len(batch.groups)), 40):
        logp = log_probs(model, micro, batch.ids[micro.tokens])
        logp.sum().backward()
        found.append(logp.detach())
    return [torch.cat(found), *(param.grad for param in model.parameters())]


@pytest.mark.parametrize("recomputed", ["none", "selective", "full"])
def test_compiled_layers_are_those_of_eager_ones(model_dir, recomputed):
    batch = Batch([*tiny.random_groups(4, 3), Group([5, 6], [Response([7, 8, 9])])])
    want = gradients(tiny.load(model_dir), batch)
    model = tiny.load(model_dir)
    torch._dynamo.utils.counters.clear()
    compilation.compile_layers(model, backend="aot_eager")
    recomputation.recompute_activations(model, recomputed, attention_interface.as_it_was(model))
    for one, other in zip(gradients(model, batch), want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    stats = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] and not torch._dynamo.utils.counters["recompile_limit"]


def test_sampling_reads_its_cache_as_before(model_dir):
    model = compilation.compile_layers(tiny.load(model_dir), backend="aot_eager")
    ids = torch.tensor([[5, 6, 7, 8]])
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        cached = model(input_ids=ids, use_cache=True).logits
        torch.testing.assert_close(cached, tiny.load(model_dir)(input_ids=ids).logits, rtol=0, atol=1e-5)
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_cpu_needs_a_compiler(model, monkeypatch):
    monkeypatch.setattr(compilation.shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"model\.compile = true needs a C\+\+ compiler on a CPU"):
        compilation.compile_layers(model)
