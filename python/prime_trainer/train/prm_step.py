"""Log-probs of the batch's tokens under policy, PRM and reference, and the online PRM update (SEMANTICS of PRIME).

In mode `after` (the paper's default) the forward pass that scores is the one whose backward updates the PRM: minibatch
k is scored by a PRM that has been updated k - 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import PRMConfig
from ..models.protocols import CausalLM
from .batch import Batch
from .forward import log_probs
from .trainable import Trainable


@dataclass
class Scores:
    """Log-probs [T] in packed order; None where no model gave them."""

    old_logp: Tensor | None
    ref_logp: Tensor | None
    prm_logp: Tensor | None
    metrics: dict[str, float]

    @property
    def log_ratio(self) -> Tensor:
        return self.prm_logp - self.ref_logp


@dataclass(frozen=True)
class Scorer:
    """`policy` and `ref` are models or None, `prm` is None for outcome-only RLOO."""

    policy: CausalLM | None
    ref: CausalLM | None
    prm: Trainable | None
    cfg: PRMConfig
    micro_batch_tokens: int
    temperature: float = 1.0
    """Of the policy alone: what samples at a temperature is trained at it."""

    def score(self, batch: Batch) -> Scores:
        """One pass over the batch for each model that is there; with a PRM, its update as `cfg.update` says."""
        everything = list(range(len(batch.groups)))
        if self.prm is None:
            return self._pass(batch, [everything], update=False)
        parts = batch.minibatches(self.cfg.minibatches)
        if self.cfg.update in ("none", "reverse"):
            scores = self._pass(batch, [everything], update=False)
            if self.cfg.update == "reverse":
                scores.metrics |= self._pass(batch, parts, update=True, known=scores).metrics
        else:
            scores = self._pass(batch, parts, update=True)
            if self.cfg.update == "before":
                scores.prm_logp = self._pass(batch, [everything], update=False, known=scores).prm_logp
        with torch.no_grad():
            whole = pk.prm_loss(
                scores.log_ratio, batch.outcomes, batch.cu_seqlens, cu_groups=batch.cu_groups, beta=self.cfg.beta
            )
        scores.metrics |= {"prm_loss": whole.loss.item(), "prm_pair_accuracy": whole.pair_accuracy.item()}
        return scores

    def _pass(
        self, batch: Batch, parts: Sequence[Sequence[int]], *, update: bool, known: Scores | None = None
    ) -> Scores:
        """Forward over `parts`, a PRM step after each if `update`; `known` log-probs are not computed again."""
        new = known is None

        def empty(wanted: bool) -> Tensor | None:
            return torch.zeros(batch.num_tokens, device=batch.device) if wanted else None

        old = empty(self.policy is not None) if new else known.old_logp
        reference = empty(self.ref is not None) if new else known.ref_logp
        prm = empty(self.prm is not None)
        metrics: dict[str, float] = {}
        for part in parts:
            share = 1.0 / max(1, batch.responses_of(part))
            for micro in batch.micro_batches(part, self.micro_batch_tokens):
                ids = batch.ids[micro.tokens]
                with torch.no_grad():
                    if new and self.policy is not None:
                        old[micro.tokens] = log_probs(self.policy, micro, ids, self.temperature)
                    if new and self.ref is not None:
                        reference[micro.tokens] = log_probs(self.ref, micro, ids)
                if self.prm is None:
                    continue
                with nullcontext() if update else torch.no_grad():
                    logp = log_probs(self.prm.model, micro, ids)
                prm[micro.tokens] = logp.detach()
                if update:
                    base = reference if reference is not None else old
                    loss = pk.prm_loss(
                        logp - base[micro.tokens],
                        batch.outcomes[micro.responses],
                        micro.cu_seqlens,
                        beta=self.cfg.beta,
                    ).loss
                    # The micro-batch's mean over responses becomes its part of the minibatch's mean.
                    (loss * (len(micro.responses) * share)).backward()
            if update:
                metrics["prm_grad_norm"] = self.prm.step()
        for found in (old, reference, prm) if new else (prm,):
            if found is not None:
                batch.ranks.sum_(found)  # each rank has filled in its own tokens
        # With ref_type = "policy" the rollout-time policy is the reference: no third model.
        return Scores(old, reference if reference is not None else old, prm, metrics)


@dataclass(frozen=True)
class Rewards:
    """Process rewards [T] and, where only some tokens carry one, which [T]."""

    values: Tensor
    carries: Tensor | None


def process_rewards(log_ratio: Tensor, batch: Batch, cfg: PRMConfig, step_ends: Tensor | None) -> Rewards:
    """beta * log-ratio at the configured granularity. `step_ends` is bool [V]: tokens that end a step."""
    values = cfg.beta * log_ratio
    if cfg.granularity == "token":
        return Rewards(values, None)
    carries = torch.zeros_like(values, dtype=torch.bool)
    nonempty = batch.cu_seqlens[1:] > batch.cu_seqlens[:-1]
    carries[batch.cu_seqlens[1:][nonempty] - 1] = True
    if cfg.granularity == "step":
        carries |= step_ends[batch.ids]
    ends = carries.nonzero().squeeze(1)
    cu_steps = torch.cat([ends.new_zeros(1), ends + 1])
    placed = torch.zeros_like(values)
    placed[ends] = pk.segment_sum(values, cu_steps)
    return Rewards(placed, carries)
