"""Model placement: sharded or whole, offloaded or not, with or without activation checkpointing."""

from __future__ import annotations

from typing import Literal

from ..config.sections import ModelConfig, ScaleConfig
from ..scale import sharding
from ..scale.ranks import Ranks
from . import loading
from .protocols import CausalLM

Role = Literal["policy", "prm", "reference"]


def load_placed(cfg: ModelConfig, scale: ScaleConfig, ranks: Ranks, role: Role) -> CausalLM:
    """The model of `cfg` as `scale` places it for its role; the reference is frozen."""
    trained = role != "reference"
    if ranks.mesh is None and scale.offload:
        raise ValueError(
            f"scale.offload = {scale.offload} moves shards: it needs scale.shard = true and torchrun "
            "(torchrun --nproc-per-node 1 for a single GPU)"
        )
    # A model that will be sharded is never whole on the device.
    where = cfg if ranks.mesh is None else cfg.model_copy(update={"device": "cpu"})
    model = loading.load_model(where)
    if not trained:
        loading.frozen(model)
    elif scale.activation_checkpointing:
        sharding.recompute_activations(model)
    if ranks.mesh is not None:
        sharding.shard(
            model, ranks.mesh, trained=trained, offload=role in scale.offload, split_head=scale.vocab_parallel_head
        )
    return model
