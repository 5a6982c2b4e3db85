"""The one configuration of a run: a TOML file, then overrides on the command line; unknown keys are errors."""

from __future__ import annotations

import contextvars
import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from .sections import (
    AlgorithmConfig,
    BenchConfig,
    CheckpointConfig,
    EvalConfig,
    FilterConfig,
    ModelConfig,
    PolicyConfig,
    PRMConfig,
    ProcessBenchConfig,
    RolloutConfig,
    ScaleConfig,
    ScoreConfig,
    SelectConfig,
    SFTConfig,
    TaskConfig,
    TrainPRMConfig,
)

_toml_file: contextvars.ContextVar[Path | None] = contextvars.ContextVar("toml_file", default=None)


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
    train_prm: TrainPRMConfig = TrainPRMConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    processbench: ProcessBenchConfig = ProcessBenchConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    policy: PolicyConfig = PolicyConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    bench: BenchConfig = BenchConfig()
    scale: ScaleConfig = ScaleConfig()

    @model_validator(mode="after")
    def _engine(self) -> RunConfig:
        # Not in the section itself: what its defaults were resolved to would count as given when some are overridden.
        self.rollout = self.rollout.resolved()
        return self

    @model_validator(mode="after")
    def _one_temperature(self) -> RunConfig:
        tempered = self.rollout.temperature != 1
        if tempered and (
            self.policy.kl_coef > 0 or (self.algorithm.process_coef > 0 and self.prm.ref_type == "policy")
        ):
            raise ValueError(
                f"rollout.temperature must be 1 with policy.kl_coef or prm.ref_type = 'policy', got "
                f"{self.rollout.temperature}: those compare the sampled policy with models at temperature 1"
            )
        return self

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
    words = _switches(list(overrides or []))
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


def _switches(words: list[str]) -> list[str]:
    """`--resume true` and `--scale.shard=false` as argparse has them: `--resume` and `--no-scale.shard`."""
    options, out = {f"--{key}" for key, kind in _fields(RunConfig) if kind is bool}, []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals and out and out[-1] in options:
            name, value = out[-1], word
        if name in options and value in ("true", "false"):
            if not equals:
                out.pop()
            out.append(name if value == "true" else f"--no-{name.removeprefix('--')}")
        else:
            out.append(word)
    return out


def keys() -> Iterator[str]:
    """Every key, sections included, dotted."""
    return (key for key, _ in _fields(RunConfig))


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its type."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.annotation
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")


def close_keys(key: str) -> str:
    matches = difflib.get_close_matches(key, list(keys()), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""
