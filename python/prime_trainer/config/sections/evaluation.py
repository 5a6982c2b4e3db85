"""Held-out problems and benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import Field, PositiveInt

from .base import Section


class EvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between evaluations on the held-out problems; 0 evaluates only before and after."""
    sampled: int = Field(default=0, ge=0)
    """Samples a problem at `rollout.temperature`; 0 is greedy only."""
    batch_size: PositiveInt = 128


BenchmarkName = Literal["aime24", "math500", "amc", "minerva", "olympiad", "humaneval", "mbpp"]


class BenchConfig(Section):
    data: Path | None = None
    """A folder with the benchmarks' files; `generate` and `eval` then work on the benchmarks."""
    paths: dict[BenchmarkName, Path] = Field(default_factory=dict)
    """Where single benchmarks are: a file, or a folder of a Hugging Face dataset."""
    tasks: tuple[BenchmarkName, ...] = get_args(BenchmarkName)
    limit: int = Field(default=0, ge=0)
    """Only the first items of each benchmark; 0 is all."""
    greedy: bool = True
    samples: int = Field(default=0, ge=0)
    """Sampled responses an item, for avg@k, maj@k and pass@k."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled responses."""
    max_new_tokens: PositiveInt = 3072
    system_prompt: str | None = None
