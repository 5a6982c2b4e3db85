"""The sampler protocol: small, so that an engine is one file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..config.sections import ModelConfig, RolloutConfig
from ..errors import RunError
from ..models.adapters.views import MergedWeights
from ..models.forward import length_limit
from ..models.loading import NamedTensors, weight_shapes
from ..models.protocols import CausalLM, Tokenizer
from ..models.tokenizers import stop_ids


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0


@dataclass(frozen=True)
class Sample:
    """One response. `ids` has the stop token where there was one; `logprobs` are the engine's own, one a token."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int


LogitsDtype = Literal["float32", "input"]
"""As `model.logits_dtype`, resolved."""


@dataclass(frozen=True)
class EngineConfig:
    """What of the configuration an engine is built from."""

    rollout: RolloutConfig
    model: ModelConfig
    output: Path
    """The run's directory, where the log of a server that the run starts is written."""


class EngineDied(RunError):
    """The engine or its weights cannot be used any more; `restart` may help."""


class Sampler(Protocol):
    version: int
    """Of the weights that sample now."""
    limit: int | None
    """Tokens of prompt and response together."""

    @property
    def logits_dtype(self) -> LogitsDtype:
        """What the log-probs of samples come from."""
        ...

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        """`n` responses a prompt. `seeds` has one seed a prompt; a response depends on it, its index and the weights
        alone, never on the caller's random state. Raises ValueError for a bad prompt, EngineDied."""

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        """The policy's full set of weights. After EngineDied nothing is sampled before a restart and an update."""

    def release(self) -> None:
        """Nothing is sampled until the next update: memory that only sampling needs may be freed."""

    def restart(self) -> None:
        """Replaces a dead engine; the new one needs an update before it samples."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class ModelShape:
    """A model's weight names and shapes, length limit and stop tokens."""

    weights: Mapping[str, torch.Size]
    stops: Sequence[int]
    vocabulary: int
    limit: int | None
    """Tokens of prompt and response together."""

    def check_prompts(self, prompts: Sequence[list[int]], sampling: Sampling) -> None:
        """One bad prompt would fail or silently shorten a whole call. Raises ValueError that names it."""
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
            if self.limit is not None and len(prompt) + sampling.max_new_tokens > self.limit:
                raise ValueError(
                    f"prompts[{i}] has {len(prompt)} tokens; with max_new_tokens = {sampling.max_new_tokens} that is "
                    f"over the model's {self.limit} positions"
                )
            wrong = next((t for t in prompt if not 0 <= t < self.vocabulary), None)
            if wrong is not None:
                raise ValueError(f"prompts[{i}] has the token {wrong}; the vocabulary has {self.vocabulary}")

    def check_weights(self, named_tensors: NamedTensors) -> Mapping[str, Tensor]:
        """The tensors by name, one of each storage: a tied head goes with its embedding. An incomplete set would
        leave a mix of two models without an error of the engine's. Raises ValueError that names what is wrong.

        Of weights that are merged with an adapter as they are taken, none is taken here."""
        found = named_tensors.plain if isinstance(named_tensors, MergedWeights) else dict(named_tensors)
        missing, unknown = self.weights.keys() - found.keys(), found.keys() - self.weights.keys()
        if missing or unknown:
            raise ValueError(
                f"the weights must be all {len(self.weights)} of the model's: {len(missing)} are missing"
                f"{_some(missing)}, {len(unknown)} unknown{_some(unknown)}"
            )
        for name, tensor in found.items():
            if tensor.shape != self.weights[name]:
                raise ValueError(f"{name} must have shape {list(self.weights[name])}, got {list(tensor.shape)}")
        first: dict[tuple[int, torch.Size], str] = {}
        for name, tensor in found.items():
            first.setdefault((tensor.data_ptr(), tensor.shape), name)
        if isinstance(named_tensors, MergedWeights):
            return named_tensors.only(first.values())
        return {name: found[name].detach() for name in first.values()}


def model_shape(model: CausalLM, tokenizer: Tokenizer, limit: int | None = None) -> ModelShape:
    """`limit` lowers the model's own, where it has one."""
    return ModelShape(
        weight_shapes(model),
        stop_ids(model, tokenizer),
        model.get_input_embeddings().weight.shape[0],
        length_limit([model], limit),
    )


def _some(names: Iterable[str]) -> str:
    shown = sorted(names)[:3]
    return f" ({', '.join(shown)})" if shown else ""
