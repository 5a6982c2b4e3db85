"""Problems, and the warm-up on demonstrations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator

from .. import action_prompt
from .base import Section


class TaskConfig(Section):
    kind: Literal["reasoning_gym", "jsonl", "parquet"] = "reasoning_gym"
    name: str = "chain_sum"
    """The reasoning-gym dataset; unused for files."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Passed to the reasoning-gym dataset."""
    path: Path | None = None
    """A JSONL or parquet file in the Eurus-2-RL-Data schema, mathematics and code mixed as they come."""
    eval_path: Path | None = None
    """Held-out problems; without it, the first `eval_size` rows of `path` are held out."""
    template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    system_prompt: str | None = None
    """`actions` is the action-centric prompt of the Eurus-2-SFT stage; any other text is used as it is."""
    eval_size: PositiveInt = 200
    reward: str | None = None
    """A function of your own, `module:function`, in place of the built-in verifiers: it gets a list of responses and
    one of problems (rows of the file, as dictionaries) and returns a score from 0 to 1 for each."""
    reward_batch: PositiveInt = 1
    """Responses that one call of `reward` gets, with `verify_seconds` for each; `verify_workers` calls at once."""
    verify_seconds: float = Field(default=5.0, gt=0)
    """Time limit of one answer; the process that exceeds it is killed and the answer scores 0."""
    verify_workers: PositiveInt | None = None
    """Answers scored at once; by default one a processor."""
    any_answer: bool = False
    """A response without a box is scored by its last formula or number; off, it scores 0."""
    interval_as_inequality: bool = True
    r"""Of mathematical answers, an interval and its inequality (`[2, \infty)`, `x \ge 2`) are the same set; off, they
    are different answers."""
    sandbox: Literal["auto", "bubblewrap", "landlock"] = "auto"
    """What confines the scoring of answers and the programs of code problems; `auto` is the first that works here."""
    allow_unsafe: bool = False
    """Where none works, run the model's programs and score answers with this user's rights. Only in a dedicated
    container."""
    code_seconds: float = Field(default=15.0, gt=0)
    """Time limit of one program over all its tests."""
    code_memory_mb: PositiveInt = 1024
    """Address space of one program in MiB. Programs cannot start processes, so it bounds all that they use."""
    code_workers: PositiveInt = 8
    """Programs that run at once."""
    code_partial_credit: bool = False
    """Score a program by the share of tests that it passes; off, all tests must pass."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row of `path` or `eval_path` that cannot be used ends the run; `skip` leaves it out and counts it."""
    code_packages: tuple[str, ...] = ("numpy",)
    """What programs can import beside the standard library."""

    _actions = field_validator("system_prompt")(action_prompt.system_prompt)

    @field_validator("reward")
    @classmethod
    def _module_and_function(cls, value: str | None) -> str | None:
        module, _, function = (value or "m:f").partition(":")
        if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
            raise ValueError(f"task.reward must be 'module:function', got {value!r}")
        return value

    @model_validator(mode="after")
    def _needs_path(self) -> TaskConfig:
        if self.kind != "reasoning_gym" and self.path is None:
            raise ValueError(f"task.path is required when task.kind = {self.kind!r}")
        if "{question}" not in self.template:
            raise ValueError(f"task.template must contain {{question}}, got {self.template!r}")
        return self


class SFTConfig(Section):
    path: Path | None = None
    """JSONL or parquet chat data: `messages`, or `instruction` and `response`. Without it, worked solutions made for
    the task (`demonstrations`)."""
    system_prompt: str | None = None
    """In place of the system message of every row of `path`; `actions` is the action-centric prompt."""
    demonstrations: PositiveInt = 512
    worked_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the made demonstrations that show their steps; the others give the boxed answer at once."""
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    lr: float = Field(default=1e-5, gt=0)
    warmup: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises."""
    grad_clip: float = Field(default=1.0, gt=0)
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite gradient after which the run ends."""
    max_length: PositiveInt = 1024
    """Tokens of prompt and answer, at most the model's positions; a longer row is an error, or left out."""
    too_long: Literal["error", "skip"] = "error"

    _actions = field_validator("system_prompt")(action_prompt.system_prompt)
