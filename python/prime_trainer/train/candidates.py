"""What the policy might have sampled instead: its probable tokens at every position, and their advantages (DistRL).

    C_t = {v : pi_old(v) >= min_prob},    A(v) = beta log(pi_prm(v) / pi_old(v)) / (std V + 1e-6),

V the running sums of beta log(pi_prm / pi_old) of the sampled tokens in the same pass of the PRM, over the whole batch:
of two PRMs, before and after an update, one's V may be 0 and the other's not. The policy's loss has
`algorithm.candidates.coef` times `prime_kernels.distribution_ppo_loss` of these on top, a mean as that of the sampled
tokens. Source: arXiv 2604.13197, equations 10 and 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .advantages import value_deviation
from .batch import Batch
from .prm_step import PRMScores, Rewards


@dataclass(frozen=True)
class CandidateTargets:
    """What the policy learns from its candidates, [T, M] each, in packed order."""

    ids: Tensor
    old_logp: Tensor
    """-inf where a position has fewer than M."""
    advantages: Tensor
    coef: float
    """Weight of their loss beside that of the sampled tokens."""

    def at(self, tokens: Tensor) -> CandidateTargets:
        """Those of some tokens."""
        return CandidateTargets(self.ids[tokens], self.old_logp[tokens], self.advantages[tokens], self.coef)


def candidate_targets(batch: Batch, scores: PRMScores, beta: float, coef: float) -> CandidateTargets:
    """Of the candidates that the scoring passes found."""
    found = scores.candidates
    if found is None or scores.old_logp is None:
        raise ValueError("scores have no candidates: give the scorer the policy and min_prob")
    log_ratio = (found.prm_logp - found.old_logp).masked_fill(found.old_logp == -torch.inf, 0.0)
    rewards = Rewards(beta * (found.token_logp - scores.old_logp))
    advantages = beta * log_ratio.double() / value_deviation(batch, rewards)
    return CandidateTargets(found.ids, found.old_logp, advantages.float(), coef)
