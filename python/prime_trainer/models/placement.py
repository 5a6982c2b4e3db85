"""Model placement: sharded or whole, offloaded or not, with or without activation checkpointing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..config.needs import Needs
from ..config.sections import ModelConfig, PRMConfig, ScaleConfig
from ..run.seeds import derive_seed
from ..scale import recomputation, sharding
from ..scale.ranks import Ranks
from . import compilation, loading, meta, prm_record, tokenizers
from .adapters import files as adapter_files
from .adapters.views import AdaptedModel, Base, as_model, lora_config
from .attention import interface as attention_interface
from .model_files import ModelError
from .protocols import CausalLM, Tokenizer

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
    else:
        recompute_activations(model, scale)
    if ranks.mesh is not None:
        sharding.shard(model, ranks.mesh, offload=role in scale.offload, split_head=scale.vocab_parallel_head)
    return model


def recompute_activations(model: CausalLM, scale: ScaleConfig) -> None:
    """Activation checkpointing as `scale` has it; layers are recomputed with the attention of their forward pass."""
    contexts = attention_interface.as_it_was(model)
    recomputation.recompute_activations(model, scale.activation_checkpointing, contexts)


@dataclass(frozen=True)
class Models:
    """Those of a run of `rl`; with `model.adapter`, views of one model in memory."""

    policy: CausalLM
    prm: CausalLM | None
    reference: CausalLM | None

    @property
    def all(self) -> list[CausalLM]:
        return [model for model in (self.policy, self.reference, self.prm) if model is not None]


@dataclass(frozen=True)
class Wanted:
    """What of a configuration decides the models of `rl`."""

    model: ModelConfig
    prm_model: ModelConfig
    prm: PRMConfig
    scale: ScaleConfig
    needs: Needs
    seed: int


def load_models(cfg: Wanted, ranks: Ranks, tokenizer: Tokenizer) -> Models:
    """The models that `cfg.needs` names, placed. `tokenizer` is the policy's, which the PRM has to share."""
    needs = cfg.needs
    if cfg.model.adapter.wanted:
        return _adapted(cfg, ranks)
    policy = load_placed(cfg.model, cfg.scale, ranks, "policy")
    prm = None
    if needs.prm:
        if cfg.prm.path is not None:
            prm_record.check_goes_on(cfg.prm_model, cfg.prm)
            tokenizers.check_same_tokenizer(
                tokenizers.load_tokenizer(cfg.prm_model), tokenizer, ("prm.path", "model.path")
            )
        prm = load_placed(cfg.prm_model, cfg.scale, ranks, "prm")
        check_same_architecture(prm, policy, ("prm.path", "model.path"))
    reference = load_placed(cfg.model, cfg.scale, ranks, "reference") if needs.reference else None
    return Models(policy, prm, reference)


def _adapted(cfg: Wanted, ranks: Ranks) -> Models:
    """The base once, the policy's adapter in it and the PRM's; the reference is the base itself."""
    where = cfg.model if ranks.mesh is None else cfg.model.model_copy(update={"device": "cpu"})
    base = load_base(where)
    policy = put_adapter(base, "policy", cfg.model, cfg.seed)
    prm = None
    if cfg.needs.prm:
        if cfg.prm.path is None:
            prm = base.add("prm", base.configs["policy"], derive_seed(cfg.seed, "adapter", "prm"))
        else:
            prm_record.check_goes_on(cfg.prm_model, cfg.prm)
            prm = _read_adapter(base, "prm", cfg.prm.path, "prm.path")
    if ranks.mesh is not None and base.head is not None:
        raise ModelError(
            "model.adapter.targets has the head, which FSDP2 keeps apart from the layers: leave it out, or set "
            "scale.shard = false, got true"
        )
    recompute_activations(base.model, cfg.scale)
    if ranks.mesh is not None:
        sharding.shard(base.model, ranks.mesh, offload=False, split_head=cfg.scale.vocab_parallel_head)
    views = [None if view is None else as_model(view) for view in (policy, prm)]
    assert views[0] is not None
    return Models(views[0], views[1], as_model(base.view(None)) if cfg.needs.reference else None)


@dataclass(frozen=True)
class WithoutData:
    """Models on the meta device, for a plan."""

    policy: CausalLM
    prm: CausalLM | None
    """None where the policy stands for it."""
    whole: CausalLM
    """With all adapters."""
    base_parameters: int
    """Of the model without adapters."""
    head_columns: int
    """That adapters on the head add to it in each pass."""


def without_data(cfg: ModelConfig, prm: PRMConfig, needs: Needs) -> WithoutData:
    """The models of `rl` as `load_models` makes them, but for their data."""
    model = meta.meta_model(cfg)
    count = sum(parameter.numel() for parameter in model.parameters())
    if not cfg.adapter.wanted:
        return WithoutData(model, None, model, count, 0)
    base = Base(model, cfg)
    given = cfg.adapter.path
    own = lora_config(cfg.adapter) if given is None else adapter_files.read_config(given, "model.adapter.path")
    with torch.device("meta"):
        policy, of_prm = as_model(base.add("policy", own, 0)), None
        if needs.prm:
            other = own if prm.path is None else adapter_files.read_config(prm.path, "prm.path")
            of_prm = as_model(base.add("prm", other, 0))
    for parameter in model.parameters():  # peft leaves adapters on this device in float32
        parameter.data = parameter.data.to(getattr(torch, cfg.dtype))
    return WithoutData(policy, of_prm, model, count, base.head_rank)


def load_base(cfg: ModelConfig) -> Base:
    """The model of `cfg`, frozen, for adapters to be put into."""
    return Base(loading.load_model(cfg), cfg)


def put_adapter(base: Base, name: str, cfg: ModelConfig, seed: int) -> AdaptedModel:
    """The adapter that `cfg.adapter` asks for: of a directory, or a new one."""
    if cfg.adapter.path is not None:
        return _read_adapter(base, name, cfg.adapter.path, "model.adapter.path")
    return base.add(name, lora_config(cfg.adapter), derive_seed(seed, "adapter", name))


def load_trained(cfg: ModelConfig, seed: int) -> CausalLM:
    """What a supervised stage trains: the model, or an adapter in it; `seed` decides how a new adapter starts."""
    if not cfg.adapter.wanted:
        return loading.load_model(cfg)
    return as_model(put_adapter(load_base(cfg), "policy", cfg, seed))


def load_used(cfg: ModelConfig) -> CausalLM:
    """What is sampled from or scores: the model, with the adapter of `model.adapter.path` if that is set."""
    if cfg.adapter.path is None:
        return loading.load_model(cfg)
    return as_model(put_adapter(load_base(cfg), "policy", cfg, 0))


def _read_adapter(base: Base, name: str, directory: Path, key: str) -> AdaptedModel:
    config = adapter_files.read_config(directory, key)
    adapter_files.check_base(
        directory, key, base.cfg.path, lambda dtype: loading.fingerprint(base.cfg.model_copy(update={"dtype": dtype}))
    )
    view = base.add(name, config, 0)
    adapter_files.read_weights(view, directory, key)
    base.directories[name] = directory
    return view
