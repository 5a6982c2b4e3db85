"""Models in shards (FSDP2): the probe of the head and LogProbHead give what they give for the whole model."""

import pytest
import torch
import torch.distributed as dist
from helpers.spawn import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from prime_kernels.integrations import CausalHead, LogProbHead, causal_head

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[train]'")

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
KINDS = {
    "tied and divided": ("Granite", {"logits_scaling": 4.0, "tie_word_embeddings": True}, CausalHead(0.25)),
    "untied": ("Llama", {"tie_word_embeddings": False}, CausalHead()),
    "capped": ("Gemma2", {"final_logit_softcapping": 30.0, "head_dim": 16}, CausalHead(1.0, 30.0)),
}


def make(kind):
    torch.manual_seed(3)
    name, settings, head = KINDS[kind]
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SMALL | settings))
    return model.eval(), head


def compare(rank, size, store):
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))
    try:
        torch.set_num_threads(1)
        mesh = init_device_mesh("cpu", (size,))
        for kind in KINDS:
            compare_kind(kind, mesh, rank)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def compare_kind(kind, mesh, rank):
    whole, head = make(kind)
    sharded, _ = make(kind)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert causal_head(sharded) == head, kind
    ids = torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(rank))
    logp = LogProbHead(sharded, temperature=0.7)(ids)
    torch.testing.assert_close(logp, LogProbHead(whole, temperature=0.7)(ids), rtol=1e-5, atol=1e-5)
    logits = whole(input_ids=ids).logits[:, :-1].double() / 0.7
    exact = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(logp.double(), exact, rtol=1e-4, atol=1e-4)


def test_shards_are_read_as_the_whole():
    spawn(compare, 2)
