"""Samplers: what turns prompts into responses."""

from .base import Sample, Sampler, Sampling, derive_seed
from .transformers_sampler import TransformersSampler

__all__ = ["Sample", "Sampler", "Sampling", "TransformersSampler", "derive_seed"]
