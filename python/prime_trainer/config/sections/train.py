"""What `rl` learns from and how."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from .base import Section

PRMKind = Literal["ce", "dpo", "kto", "nca", "prefix"]
"""Losses of `prime_kernels.prm_loss`, for `rl` and for `prm`."""
COUPLED_KINDS: tuple[PRMKind, ...] = ("dpo", "kto", "nca")
"""Those in which a response's gradient depends on other responses."""
BALANCED_KINDS: tuple[PRMKind, ...] = ("ce", "prefix")
"""Those that `prm.balance` is for: a loss of each response by itself."""
_MARGIN = 5.0
"""Of "prefix" (arXiv 2604.13197)."""


class PRMLossConfig(Section):
    """The loss of a PRM, online and offline."""

    kind: PRMKind = "ce"
    """The loss of outcomes: cross-entropy; pairs of right and wrong responses (dpo, nca); kto; or the cross-entropy of
    every prefix with a margin (prefix)."""
    beta: float | None = Field(default=None, gt=0)
    """Reward of a log-ratio of 1. Without it 0.05; 10 for `prefix`, whose values are means over tokens."""
    margin: float = Field(default=_MARGIN, ge=0)
    """Of `prefix`: how far beyond the boundary values are wanted."""

    @property
    def scale(self) -> float:
        """`beta` with its default resolved."""
        if self.beta is not None:
            return self.beta
        return 10.0 if self.kind == "prefix" else 0.05

    @model_validator(mode="after")
    def _has_margin(self) -> PRMLossConfig:
        if self.margin != _MARGIN and self.kind != "prefix":
            raise ValueError(f"margin is for kind 'prefix', got margin {self.margin:g} with kind {self.kind!r}")
        return self


class PRMConfig(PRMLossConfig):
    path: Path | None = None
    """A trained PRM to start from (what `prime-trainer prm` saved), with the tokenizer of `model.path`; unset, the PRM
    starts from `model.path`, which stays its reference in both cases."""
    update: Literal["after", "before", "reverse", "none"] = "after"
    ref_type: Literal["freeze", "policy"] = "freeze"
    granularity: Literal["token", "step", "whole"] = "token"
    balance: bool = False
    """Of `ce` and `prefix`: move the boundary by the group's accuracy, weigh responses by rarity in their group."""
    lr: float = Field(default=1e-6, gt=0)
    grad_clip: float = Field(default=10.0, gt=0)
    minibatches: PositiveInt = 1
    """Optimizer steps the PRM takes on a batch; whole groups stay together."""

    @model_validator(mode="after")
    def _balanced(self) -> PRMConfig:
        if self.balance and self.kind not in BALANCED_KINDS:
            raise ValueError(f"prm.balance is for prm.kind {' or '.join(BALANCED_KINDS)}, got {self.kind!r}")
        return self


_MIN_PROB = 0.1


class CandidatesConfig(Section):
    """DistRL: a clipped loss over the policy's probable tokens at every position, beside that of the sampled ones."""

    coef: float = Field(default=0.0, ge=0)
    """Weight of that loss; 0 is none. 0.1 in arXiv 2604.13197."""
    min_prob: float = Field(default=_MIN_PROB, ge=0.01, le=1.0)
    """Least probability of a candidate under the policy that sampled."""

    @model_validator(mode="after")
    def _used(self) -> CandidatesConfig:
        if self.min_prob != _MIN_PROB and self.coef == 0:
            raise ValueError(f"min_prob is for coef above 0, got min_prob {self.min_prob:g} with coef 0")
        return self


class AlgorithmConfig(Section):
    estimator: Literal["rloo", "grpo", "reinforce"] = "rloo"
    """What an outcome is compared with: the mean of the group's others; the group's mean, in units of its standard
    deviation (no `whiten` then, to be GRPO); nothing, so that whitening is the only baseline (REINFORCE++)."""
    process_coef: float = Field(default=1.0, ge=0)
    """0 is outcomes alone: no PRM is loaded. The 5 in the paper's scripts never reaches RLOO in its public code."""
    outcome_coef: float = Field(default=1.0, ge=0)
    process_return: Literal["sum", "min", "gae"] = "sum"
    """A token's credit: the discounted sum of the process rewards from it on; their minimum (PURE), less the mean of
    the other responses' minima (our own baseline); or the discounted sum of standardised rewards with gamma_process *
    gae_lambda."""
    gamma_process: float = Field(default=1.0, ge=0.0, le=1.0)
    gamma_outcome: float = Field(default=1.0, ge=0.0, le=1.0)
    gae_lambda: float = Field(default=0.95, ge=0.0, le=1.0)
    """Of `process_return = "gae"`."""
    normalize_process: bool = True
    """Divide by the largest return of the batch; of `sum` and `min`, as `gae` is standardised."""
    process_baseline: Literal["reference", "paper"] = "reference"
    """Of `sum`: RLOO as the paper's public code has it, or its equation 5."""
    whiten: bool = True
    """Advantages of mean 0 and variance 1 over the batch's tokens."""
    whiten_of: Literal["sum", "source"] = "sum"
    """What is whitened: the sum of both sources, or each source before its coefficient."""
    candidates: CandidatesConfig = CandidatesConfig()

    @model_validator(mode="after")
    def _no_discounted_minimum(self) -> AlgorithmConfig:
        if self.process_return == "min" and self.gamma_process != 1:
            raise ValueError(
                f"algorithm.gamma_process must be 1 with process_return = 'min', got {self.gamma_process}: a minimum "
                "has no discount"
            )
        if self.process_return != "sum" and self.process_baseline != "reference":
            raise ValueError(
                f"algorithm.process_baseline = {self.process_baseline!r} is a baseline of process_return = 'sum', got "
                f"{self.process_return!r}"
            )
        return self


class PolicyConfig(Section):
    lr: float = Field(default=5e-7, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 4
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    """0.28 is the wider bound of DAPO (arXiv 2503.14476) and of what followed it."""
    dual_clip: float | None = Field(default=None, gt=1)
    """The largest ratio that counts for a sampled token with a negative advantage (arXiv 1912.09729), such as 3; unset:
    no bound."""
    entropy_coef: float = Field(default=0.0, ge=0)
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of an estimate of KL(policy || reference) in the loss."""
    kl_estimator: Literal["k3", "k2"] = "k3"
    """With d = log pi_ref - log pi: exp(d) - d - 1, whose value is unbiased; or d^2 / 2, whose gradient is."""
    loss_mean: Literal["token", "sequence"] = "token"
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite loss or gradient, of policy or PRM, after which the run ends."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps on a batch, if it has as many groups as minibatches."""
        return self.epochs * self.minibatches

    @property
    def fused_loss(self) -> bool:
        """Whether nothing but PPO's loss needs the log-probs: loss and gradients then come from one pass."""
        return self.entropy_coef == 0 and self.kl_coef == 0


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 keeps only the one at the end (or at Ctrl-C)."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep; with 2, a corrupted last one leaves another to resume from."""
