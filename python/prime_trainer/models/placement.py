"""Model placement: sharded or whole, offloaded or not, with or without activation checkpointing."""

from __future__ import annotations

from typing import Literal

from ..config.sections import ModelConfig, ScaleConfig
from ..scale import sharding
from ..scale.ranks import Ranks
from . import attention_interface, compilation, loading
from .model_files import ModelError
from .protocols import CausalLM

Role = Literal["policy", "prm", "reference"]


# What a configuration says of files, versions and sampling.
_NO_ARCHITECTURE = {"_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "pad_token_id",
                    "torch_dtype", "transformers_version", "use_cache"}  # fmt: skip


def check_same_architecture(one: CausalLM, other: CausalLM, names: tuple[str, str]) -> None:
    """Raises ModelError unless the models differ in their weights alone: a batch is laid out for both, and planned."""
    first, second = (
        {key: value for key, value in model.config.to_dict().items() if key not in _NO_ARCHITECTURE}
        for model in (one, other)
    )
    for key in sorted(first.keys() | second.keys()):
        a, b = first.get(key, "missing"), second.get(key, "missing")
        if a != b:
            raise ModelError(f"{names[0]} and {names[1]} must be of one architecture, but {key} is {a!r} and {b!r}")


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
    if cfg.compile:
        compilation.compile_layers(model)
    if not trained:
        loading.frozen(model)
    elif scale.activation_checkpointing:
        sharding.recompute_activations(model, attention_interface.as_it_was(model))
    if ranks.mesh is not None:
        sharding.shard(
            model, ranks.mesh, trained=trained, offload=role in scale.offload, split_head=scale.vocab_parallel_head
        )
    return model
