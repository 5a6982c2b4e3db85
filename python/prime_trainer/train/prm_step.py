"""Log-probs of the batch's tokens under policy, reference and PRM, and the online PRM update (SEMANTICS of PRIME).

In mode `after` (the paper's default) the forward pass that scores is the one whose backward updates the PRM: minibatch
k is scored by a PRM that has been updated k - 1 times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import COUPLED_KINDS, PRMConfig
from ..models.protocols import CausalLM
from ..scale.transfer import Values
from .batch import Batch, Parts
from .forward import candidates, log_probs
from .prm_objective import Objective, backward, balance_of
from .trainable import Trainable


@dataclass(frozen=True)
class Found:
    """Tokens of at least `min_prob` under the policy before its update, most probable first: [T, M] in packed order."""

    ids: Tensor
    """0 after the last one of a position."""
    old_logp: Tensor
    """Under that policy; -inf after the last one."""

    @property
    def metrics(self) -> Values:
        """Candidates a position, and the probability that they hold together."""
        there, n_tokens = self.old_logp > -torch.inf, max(1, len(self.ids))
        return {
            "candidates": there.sum().double() / n_tokens,
            "candidate_mass": self.old_logp.double().exp().sum() / n_tokens,
        }


@dataclass(frozen=True)
class FoundByPRM(Found):
    """With what the PRM makes of them in one pass: after its update, unless `prm.update` is "reverse"."""

    prm_logp: Tensor
    """[T, M], meaningless after the last one."""
    token_logp: Tensor
    """[T] of the sampled tokens."""


@dataclass(frozen=True)
class Scores:
    """Log-probs [T] in packed order; None where no model gave them."""

    old_logp: Tensor | None
    """Of the policy before its update."""
    ref_logp: Tensor | None
    """Of the frozen reference."""
    metrics: Values
    candidates: Found | None = None


@dataclass(frozen=True)
class PRMScores:
    """Log-probs [T] in packed order, those of the PRM and its reference among them."""

    old_logp: Tensor | None
    ref_logp: Tensor
    """Of the PRM's reference: the frozen one, or the policy before its update."""
    prm_logp: Tensor
    metrics: Values
    candidates: FoundByPRM | None = None

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
    min_prob: float | None = None
    """With it, the policy's pass finds all tokens of at least this probability, too."""

    def parts(self, batch: Batch) -> Parts:
        """The groups of the passes that `score` makes, for `Batch.lay_out`."""
        return [range(len(batch.groups))]

    def score(self, batch: Batch) -> Scores:
        return self.passes(batch, self.parts(batch))

    def passes(self, batch: Batch, parts: Parts) -> Scores:
        """Laid out by `parts`: log-ratios of equal weights are exactly 0 only between passes of equal layout."""
        old_logp, found = None, None
        if self.policy is not None and self.min_prob is not None:
            old_logp, found = self._candidates(self.policy, batch, parts, self.min_prob)
        elif self.policy is not None:
            old_logp = self.log_probs(self.policy, batch, parts, temperature=self.temperature)
        ref_logp = None if self.reference is None else self.log_probs(self.reference, batch, parts)
        return Scores(old_logp, ref_logp, {} if found is None else found.metrics, found)

    @torch.no_grad()
    def log_probs(
        self, model: CausalLM, batch: Batch, parts: Parts, ids: Tensor | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Log-probs of the batch's tokens, or of `ids` [T] or [T, K]; each rank computes those of its groups."""
        ids = batch.ids if ids is None else ids
        found = torch.zeros(ids.shape, device=batch.device)
        for part in parts:
            for micro in batch.micro_batches(part, self.micro_batch_tokens):
                found[micro.tokens] = log_probs(model, micro, ids[micro.tokens], temperature)
        return batch.ranks.sum_(found)

    @torch.no_grad()
    def _candidates(self, model: CausalLM, batch: Batch, parts: Parts, min_prob: float) -> tuple[Tensor, Found]:
        """The tokens' log-probs [T] and the candidates, as many columns as the position with most of them has."""
        columns: list[Tensor] = []
        for part in parts:
            for micro in batch.micro_batches(part, self.micro_batch_tokens):
                own = batch.ids[micro.tokens]
                found = candidates(model, micro, own, min_prob=min_prob, temperature=self.temperature)
                assert found.token_logp is not None
                mine = (found.token_logp, found.ids, found.logp)
                if not columns:
                    columns = [each.new_zeros(batch.num_tokens, *each.shape[1:]) for each in mine]
                for whole, each in zip(columns, mine, strict=True):
                    whole[micro.tokens] = each
        logp, ids, of_candidates = (batch.ranks.sum_(each) for each in columns)
        most = max(1, int((of_candidates > -torch.inf).sum(1).max())) if batch.num_tokens else 1
        return logp, Found(ids[:, :most].contiguous(), of_candidates[:, :most].contiguous())


@dataclass(frozen=True)
class PRMScorer:
    """Scores with a PRM and updates it as `cfg.update` says. `frozen` has its reference, or else the policy."""

    frozen: Scorer
    prm: Trainable
    cfg: PRMConfig

    def parts(self, batch: Batch) -> Parts:
        """The groups of the passes that `score` makes, for `Batch.lay_out`."""
        found = batch.minibatches(self.cfg.minibatches) if self.cfg.update != "none" else []
        return found if self.cfg.update == "after" else [*found, *self.frozen.parts(batch)]

    def score(self, batch: Batch) -> PRMScores:
        """A pass over the batch for each model, and the PRM's update. Waits for nothing but the norm of each update's
        gradients and, with candidates, for their number."""
        everything = self.frozen.parts(batch)
        parts, update = batch.minibatches(self.cfg.minibatches), self.cfg.update
        scores = self.frozen.passes(batch, parts if update in ("after", "before") else everything)
        reference = scores.old_logp if scores.ref_logp is None else scores.ref_logp
        if reference is None:
            raise ValueError("a PRM needs the log-probs of its reference: give the frozen model or the policy")
        metrics = dict(scores.metrics)
        prm_logp: Tensor | None = None
        found, by_prm = scores.candidates, None
        if update in ("after", "before"):
            prm_logp, metrics["prm_grad_norm"] = self._update(batch, parts, reference)
        of_unseen = prm_logp if update == "before" else None
        if found is not None:
            # Where the PRM scores while it updates, this is a pass more.
            by_prm = self._of_candidates(batch, parts if update == "after" else everything, found)
            prm_logp = prm_logp if update == "after" else by_prm.token_logp
        elif update != "after":
            prm_logp = self.frozen.log_probs(self.prm.model, batch, everything)
        if update == "reverse":
            _, metrics["prm_grad_norm"] = self._update(batch, parts, reference)
        assert prm_logp is not None
        scored = PRMScores(scores.old_logp, reference, prm_logp, metrics, by_prm)
        with torch.no_grad():
            # What the PRM makes of groups that it has not learnt from; the rewards of `before` come after that.
            unseen = scored.log_ratio if of_unseen is None else of_unseen - reference
            whole = self._objective(batch, range(len(batch.groups)))(unseen)
        metrics |= {"prm_loss": whole.loss, "prm_pair_accuracy": whole.pair_accuracy}
        return scored

    def _of_candidates(self, batch: Batch, parts: Parts, found: Found) -> FoundByPRM:
        several = torch.cat([batch.ids.unsqueeze(1), found.ids], 1)
        logp = self.frozen.log_probs(self.prm.model, batch, parts, several)
        return FoundByPRM(found.ids, found.old_logp, logp[:, 1:], logp[:, 0].contiguous())

    def _objective(self, batch: Batch, part: Sequence[int]) -> Objective:
        cfg = self.cfg
        return Objective(batch, part, cfg.kind, cfg.scale, balance_of(batch) if cfg.balance else None, cfg.margin)

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
    """Process rewards [T], 0 at tokens without one."""

    values: Tensor
    places: Tensor | None = None
    """[N] the tokens that have one, rising; None: all."""

    @cached_property
    def mask(self) -> Tensor | None:
        """bool [T], or None: all tokens have one."""
        if self.places is None:
            return None
        return torch.zeros_like(self.values, dtype=torch.bool).index_fill_(0, self.places, True)


def process_rewards(log_ratio: Tensor, batch: Batch, cfg: PRMConfig, step_ends: Tensor | None) -> Rewards:
    """beta * log-ratio at the configured granularity. `step_ends`, bool [V] on the host, are the tokens that end a
    step; it is required for `prm.granularity = "step"`."""
    values = cfg.scale * log_ratio
    if cfg.granularity == "token":
        return Rewards(values)
    if cfg.granularity == "step" and step_ends is None:
        raise ValueError("prm.granularity = 'step' needs step_ends, the tokens that end a step; got None")
    ends, cu_steps = batch.ends(step_ends if cfg.granularity == "step" else None)
    placed = torch.zeros_like(values)
    placed[ends] = pk.segment_sum(values, cu_steps)
    return Rewards(placed, ends)
