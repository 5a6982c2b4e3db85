"""Log-probs of the batch's tokens under policy, reference and PRM, and the online PRM update (SEMANTICS of PRIME).

In mode `after` (the paper's default) the forward pass that scores is the one whose backward updates the PRM: minibatch
k is scored by a PRM that has been updated k - 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import COUPLED_KINDS, PRMConfig
from ..models.protocols import CausalLM
from .batch import Batch
from .forward import log_probs
from .prm_objective import Objective, backward, balance_of
from .trainable import Trainable

Parts = Sequence[Sequence[int]]
"""Minibatches, each as indices of groups."""


@dataclass(frozen=True)
class Scores:
    """Log-probs [T] in packed order; None where no model gave them."""

    old_logp: Tensor | None
    """Of the policy before its update."""
    ref_logp: Tensor | None
    """Of the frozen reference."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class PRMScores:
    """Log-probs [T] in packed order, those of the PRM and its reference among them."""

    old_logp: Tensor | None
    ref_logp: Tensor
    """Of the PRM's reference: the frozen one, or the policy before its update."""
    prm_logp: Tensor
    metrics: dict[str, float]

    @property
    def log_ratio(self) -> Tensor:
        """[T] log pi_prm - log pi_ref."""
        return self.prm_logp - self.ref_logp


@dataclass(frozen=True)
class Scorer:
    """Log-probs of policy and reference, where given; trains neither."""

    policy: CausalLM | None
    reference: CausalLM | None
    micro_batch_tokens: int
    temperature: float = 1.0
    """Of the policy only, which is trained at the temperature that it samples at."""

    def score(self, batch: Batch) -> Scores:
        return self.passes(batch, [range(len(batch.groups))])

    def passes(self, batch: Batch, parts: Parts) -> Scores:
        """Laid out by `parts`: log-ratios of equal weights are exactly 0 only between passes of equal layout."""
        return Scores(
            None if self.policy is None else self.log_probs(self.policy, batch, parts, self.temperature),
            None if self.reference is None else self.log_probs(self.reference, batch, parts),
            {},
        )

    @torch.no_grad()
    def log_probs(self, model: CausalLM, batch: Batch, parts: Parts, temperature: float = 1.0) -> Tensor:
        """[T] log-probs of all tokens; each rank computes those of its share of the groups."""
        found = torch.zeros(batch.num_tokens, device=batch.device)
        for part in parts:
            for micro in batch.micro_batches(part, self.micro_batch_tokens):
                found[micro.tokens] = log_probs(model, micro, batch.ids[micro.tokens], temperature)
        return batch.ranks.sum_(found)


@dataclass(frozen=True)
class PRMScorer:
    """Scores with a PRM and updates it as `cfg.update` says. `frozen` has its reference, or else the policy."""

    frozen: Scorer
    prm: Trainable
    cfg: PRMConfig

    def score(self, batch: Batch) -> PRMScores:
        """A pass over the batch for each model, and the PRM's update."""
        everything: Parts = [range(len(batch.groups))]
        parts, update = batch.minibatches(self.cfg.minibatches), self.cfg.update
        scores = self.frozen.passes(batch, parts if update in ("after", "before") else everything)
        reference = scores.old_logp if scores.ref_logp is None else scores.ref_logp
        if reference is None:
            raise ValueError("a PRM needs the log-probs of its reference: give the frozen model or the policy")
        metrics: dict[str, float] = {}
        if update == "after":
            prm_logp, metrics["prm_grad_norm"] = self._update(batch, parts, reference)
        elif update == "before":
            _, metrics["prm_grad_norm"] = self._update(batch, parts, reference)
            prm_logp = self.frozen.log_probs(self.prm.model, batch, everything)
        else:
            prm_logp = self.frozen.log_probs(self.prm.model, batch, everything)
            if update == "reverse":
                _, metrics["prm_grad_norm"] = self._update(batch, parts, reference)
        found = PRMScores(scores.old_logp, reference, prm_logp, metrics)
        with torch.no_grad():
            whole = self._objective(batch, range(len(batch.groups)))(found.log_ratio)
        metrics |= {"prm_loss": whole.loss.item(), "prm_pair_accuracy": whole.pair_accuracy.item()}
        return found

    def _objective(self, batch: Batch, part: Sequence[int]) -> Objective:
        return Objective(batch, part, self.cfg.kind, self.cfg.beta, balance_of(batch) if self.cfg.balance else None)

    def _update(self, batch: Batch, parts: Parts, reference: Tensor) -> tuple[Tensor, float]:
        """One optimizer step for each of `parts`; returns log-probs [T] from before each step, and the last norm."""
        logps, norm = torch.zeros(batch.num_tokens, device=batch.device), 0.0
        for part in parts:
            logps += backward(
                self.prm.model, batch, part, reference, self._objective(batch, part).loss,
                self.frozen.micro_batch_tokens, coupled=self.cfg.kind in COUPLED_KINDS,
            )  # fmt: skip
            norm = self.prm.step()
        return batch.ranks.sum_(logps), norm


@dataclass(frozen=True)
class Rewards:
    """Process rewards [T] and, where only some tokens have one, which: bool [T]."""

    values: Tensor
    mask: Tensor | None


def process_rewards(log_ratio: Tensor, batch: Batch, cfg: PRMConfig, step_ends: Tensor | None) -> Rewards:
    """beta * log-ratio at the configured granularity. `step_ends`, bool [V], are the tokens that end a step; it is
    required for `prm.granularity = "step"`."""
    values = cfg.beta * log_ratio
    if cfg.granularity == "token":
        return Rewards(values, None)
    mask = torch.zeros_like(values, dtype=torch.bool)
    nonempty = batch.cu_seqlens[1:] > batch.cu_seqlens[:-1]
    mask[batch.cu_seqlens[1:][nonempty] - 1] = True
    if cfg.granularity == "step":
        if step_ends is None:
            raise ValueError("prm.granularity = 'step' needs step_ends, the tokens that end a step; got None")
        mask |= step_ends[batch.ids]
    ends = mask.nonzero().squeeze(1)
    cu_steps = torch.cat([ends.new_zeros(1), ends + 1])
    placed = torch.zeros_like(values)
    placed[ends] = pk.segment_sum(values, cu_steps)
    return Rewards(placed, mask)
