"""The configuration of a run, all sections together; unknown keys are errors."""

from __future__ import annotations

import contextvars
from pathlib import Path

from pydantic import Field, PositiveInt, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from .bounds import Bounded
from .needs import Needs, needs_of
from .sections import (
    AdapterConfig,
    AlgorithmConfig,
    BenchConfig,
    CheckpointConfig,
    EvalConfig,
    FilterConfig,
    MetricsConfig,
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


class RunConfig(Bounded, BaseSettings):
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
    wait_lock: float = Field(default=0.0, ge=0)
    """Seconds to wait for another process that works in `output`, as the one before a requeued job may, to end."""
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
    metrics: MetricsConfig = MetricsConfig()
    bench: BenchConfig = BenchConfig()
    scale: ScaleConfig = ScaleConfig()

    @property
    def needs(self) -> Needs:
        """Which models, passes and log-probs a step of `rl` needs."""
        return needs_of(self.policy, self.prm, self.algorithm, self.rollout)

    @property
    def prm_model(self) -> ModelConfig:
        """What the PRM of `rl` starts from."""
        if self.model.adapter.wanted:
            return self.model.model_copy(update={"adapter": AdapterConfig(path=self.prm.path)})
        if self.prm.path is None:
            return self.model
        return self.model.elsewhere(self.prm.path, "prm.path")

    @model_validator(mode="after")
    def _engine(self) -> RunConfig:
        # Not in the section itself: what its defaults were resolved to would count as given when some are overridden.
        self.rollout = self.rollout.resolved()
        return self

    @model_validator(mode="after")
    def _betas(self) -> RunConfig:
        # As above; and a run says what it runs with.
        self.prm = self.prm.model_copy(update={"beta": self.prm.scale})
        self.train_prm = self.train_prm.model_copy(update={"beta": self.train_prm.scale})
        return self

    @model_validator(mode="after")
    def _one_temperature(self) -> RunConfig:
        if self.rollout.temperature != 1 and (self.policy.kl_coef > 0 or self.needs.policy_is_reference):
            raise ValueError(
                f"rollout.temperature must be 1 with policy.kl_coef or prm.ref_type = 'policy', got "
                f"{self.rollout.temperature}: those compare the sampled policy with models at temperature 1"
            )
        return self

    @model_validator(mode="after")
    def _candidates(self) -> RunConfig:
        coef = self.algorithm.candidates.coef
        if coef > 0 and not self.needs.policy_is_reference:
            raise ValueError(
                f"algorithm.candidates.coef = {coef:g} compares the PRM with the policy that sampled: expected "
                f"prm.ref_type 'policy' and algorithm.process_coef above 0, got {self.prm.ref_type!r} and "
                f"{self.algorithm.process_coef:g}"
            )
        if coef > 0 and self.scale.vocab_parallel_head:
            raise ValueError(
                f"algorithm.candidates.coef = {coef:g} needs whole rows of logits: scale.vocab_parallel_head must be "
                "false, got true"
            )
        return self

    @model_validator(mode="after")
    def _one_base(self) -> RunConfig:
        if self.model.adapter.wanted and self.scale.offload:
            raise ValueError(
                "scale.offload moves whole models, but with model.adapter policy, PRM and reference share one: it must "
                f"be empty, got {self.scale.offload}"
            )
        if self.model.adapter.wanted and self.model.compile:
            raise ValueError(
                "model.compile must be false with model.adapter, got true: compiled layers would keep one adapter of "
                "those that take turns"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # No environment variables: a run is what its file and its command line say, nothing else.
        toml = _toml_file.get()
        return (init_settings,) if toml is None else (init_settings, TomlConfigSettingsSource(settings_cls, toml))
