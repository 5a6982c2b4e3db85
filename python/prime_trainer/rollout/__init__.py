"""Rollouts: prompts in, responses and their rewards out."""

from __future__ import annotations

from .engines import follow_logits, make_sampler, weights
from .sampler import EngineConfig, EngineDied, Sample, Sampler, Sampling
from .transformers_sampler import TransformersSampler

__all__ = [
    "EngineConfig",
    "EngineDied",
    "Sample",
    "Sampler",
    "Sampling",
    "TransformersSampler",
    "follow_logits",
    "make_sampler",
    "weights",
]
