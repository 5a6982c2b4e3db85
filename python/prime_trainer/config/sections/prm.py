"""Implicit PRMs offline: training, scoring, choosing, ProcessBench."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from .base import Section
from .train import PRMLossConfig


class TrainPRMConfig(PRMLossConfig):
    """`prime-trainer prm`: offline training of an implicit PRM; `model` is what it starts from."""

    path: Path | None = None
    """JSONL or parquet rows: prompt (or instruction), response and label; or prompt, completions and correctness."""
    eval_path: Path | None = None
    """Held-out rows of the same forms; without it, `eval_share` of the prompts of `path` are held out."""
    eval_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    step_path: Path | None = None
    """Stage 2: rows with steps and step_labels, mixed in."""
    reference: Path | None = None
    """The frozen reference, a model directory; without it, the model that training starts from."""
    lr: float = Field(default=5e-7, gt=0)
    warmup: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises; after that a cosine to a tenth."""
    grad_clip: float = Field(default=1.0, gt=0)
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite gradient after which the run ends."""
    batch_size: PositiveInt = 64
    """Responses an optimizer step, in whole prompt groups."""
    step_batch_size: PositiveInt = 16
    """Step-labelled responses an optimizer step."""
    step_coef: float = Field(default=1.0, ge=0)
    """Weight of the squared error of step labels beside the loss of outcomes."""
    epochs: PositiveInt = 1
    max_length: PositiveInt = 8192
    """Tokens of prompt and response, at most the positions of model and reference; a longer row is an error, or left
    out."""
    too_long: Literal["error", "skip"] = "error"
    eval_every: int = Field(default=10, ge=0)
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    cache: Path = Path("runs/reference-cache")
    """Cached log-probs of the reference, keyed by model, data and tokenizer, so never stale."""

    @model_validator(mode="after")
    def _steps_are_sums(self) -> TrainPRMConfig:
        if self.kind == "prefix" and self.step_path is not None:
            raise ValueError(
                "train_prm.step_path fits sums of rewards to step labels, train_prm.kind = 'prefix' means: got both"
            )
        return self


Compat = Literal["eurus-card"]
Splitter = Literal["blank_line", "line", "numbered", "action", "none"]
ScoreValue = Literal["sum", "mean"]
"""Q_k, the value of a response up to the end of step k: beta times the sum of its tokens' log-ratios, or their mean."""


class ScoreConfig(Section):
    """`prime-trainer score`: rewards of responses; `model` is the PRM."""

    path: Path | None = None
    """JSONL or parquet rows: prompt and response, steps or completions."""
    reference: Path | None = None
    """The model that the PRM was trained from (its directory)."""
    beta: float | None = Field(default=None, gt=0)
    """Without it that of the PRM's own training (`prm.json` beside its weights); where that is not known 0.05, 10 for
    means, the card's 0.001 with `compat`."""
    value: ScoreValue | None = None
    """Q_k, by which steps are scored: beta times the sum of the log-ratios up to the end of step k, or times their mean
    for a PRM of kind `prefix`. Without it as the PRM was trained (`prm.json`), the sum where that is not known."""
    splitter: Splitter = "blank_line"
    """Where steps of a response begin: after a blank line, on every line, at "Step n:", at [ACTION], nowhere. Rows with
    `steps` have their own."""
    compat: Compat | None = None
    """`eurus-card`: number for number what the EurusPRM card's snippet gives, its index arithmetic included."""
    max_length: PositiveInt = 8192
    too_long: Literal["error", "skip"] = "error"
    """`skip` writes such a row with an `error` field in place of rewards."""
    tokens: bool = True
    """Write every token and its reward; the page of coloured tokens needs them."""
    name: str | None = None
    """What tables call this reward model; without it, `model.path`."""
    window: PositiveInt = 256
    """Responses held in memory at a time: those to the same prompt share its computation."""
    page_rows: int = Field(default=200, ge=0)
    """Responses on the HTML page; 0 writes none."""


class SelectConfig(Section):
    """`prime-trainer select`: what choosing among n responses by their rewards gives."""

    paths: list[Path] = Field(default_factory=list)
    """Files that `score` wrote: one for each reward model and benchmark."""
    n: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16, 32, 64])
    step_rewards: Literal["single", "cumulative"] = "single"
    """What min, mean, sum and last are taken over. The sum of single rewards is the last cumulative one."""
    bootstrap: PositiveInt = 1000
    """Resamples of the problems for the 95 % intervals."""


class ProcessBenchConfig(Section):
    """`prime-trainer processbench`: where the first wrong step is. A set is a file that `score` wrote, or one of the
    benchmark's own, which is scored first: `model` and section `score`."""

    data: Path | None = None
    """The folder of the benchmark's own files: gsm8k.json (the threshold is chosen on it), math.json,
    olympiadbench.json, omnimath.json, as many as are there."""
    tune: Path | None = None
    """The set on which the threshold is chosen (GSM8K on the cards)."""
    paths: list[Path] = Field(default_factory=list)
    """Further sets on which it is used."""
    compare: int = Field(default=16, ge=0)
    """Chains of the first set that are also scored one at a time, each model's logits whole, to compare the speed."""
