"""What a PRM learns, online and offline: the loss of a set of responses and its gradients, a forward pass at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import COUPLED_KINDS
from ..models.protocols import CausalLM
from .batch import Batch
from .forward import log_probs


@dataclass(frozen=True)
class Balance:
    """Of each response, [B] float32: the factor of its loss, and what is added to its value."""

    weights: Tensor
    shift: Tensor


def balance_of(batch: Batch) -> Balance:
    """Weights by rarity and the boundary by difficulty (arXiv 2604.13197, equation 15): with mu the group's mean
    outcome, logit(mu) is added to the value, and a response weighs 1 - mu if right, mu if wrong.

    A soft outcome a weighs a * (1 - mu) + (1 - a) * mu. Responses of groups that are all right or all wrong weigh 0.
    """
    group = torch.repeat_interleave(batch.cu_groups.diff(), output_size=batch.num_responses)
    counted = (batch.cu_seqlens.diff() > 0).double()
    outcomes = batch.outcomes.double()

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(batch.groups)).index_add_(0, group, values)

    mean = (total(outcomes * counted) / total(counted).clamp(min=1))[group]
    weights = outcomes * (1 - mean) + (1 - outcomes) * mean
    # Where mu is 0 or 1 the weight is 0: there the logit only has to be finite.
    return Balance(weights.float(), torch.logit(mean, eps=1e-6).float())


@dataclass(frozen=True)
class Objective:
    """The loss of the responses of consecutive groups of a batch, as a function of all of the batch's log-ratios."""

    batch: Batch
    part: Sequence[int]
    """Indices of groups, consecutive."""
    kind: str
    beta: float
    balance: Balance | None = None
    """Of the whole batch; for the kinds "ce" and "prefix"."""
    margin: float = 5.0
    """Of the kind "prefix"."""

    def __post_init__(self) -> None:
        if list(self.part) != list(range(self.part[0], self.part[0] + len(self.part))):
            raise ValueError(f"part: expected consecutive groups, got {list(self.part)}")

    def loss(self, log_ratio: Tensor) -> Tensor:
        """The loss alone; the order of pairs is not looked at for a gradient."""
        return self._of(log_ratio, grouped=self.kind in COUPLED_KINDS).loss

    def __call__(self, log_ratio: Tensor) -> pk.PRMLoss:
        """`log_ratio` [T] of the batch."""
        return self._of(log_ratio, grouped=True)

    def _of(self, log_ratio: Tensor, *, grouped: bool) -> pk.PRMLoss:
        batch, balance, (responses, tokens) = self.batch, self.balance, self.batch.spans_of(self.part)
        cu_groups = batch.cu_groups[self.part[0] : self.part[-1] + 2] - responses.start
        return pk.prm_loss(
            log_ratio[tokens], batch.outcomes[responses],
            batch.cu_seqlens[responses.start : responses.stop + 1] - tokens.start,
            cu_groups=cu_groups if grouped else None, kind=self.kind, beta=self.beta, margin=self.margin,
            weights=None if balance is None else balance.weights[responses],
            shift=None if balance is None else balance.shift[responses],
        )  # fmt: skip


def backward(
    model: CausalLM,
    batch: Batch,
    part: Sequence[int],
    reference: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    max_tokens: int,
    *,
    coupled: bool,
) -> Tensor:
    """Adds the gradients of `loss_of(log_ratio)`, a loss of the groups `part`, to the model's; returns the log-probs
    [T] of the tokens that this rank computed, 0 elsewhere.

    `reference` [T] are the reference's log-probs, `log_ratio` [T] the difference. Where the loss couples responses
    (pairs, a mean over the batch), all log-ratios must be known before the first gradient is: that takes a second
    forward pass unless one holds all of `part`.
    """
    micros = batch.micro_batches(part, max_tokens)
    known = torch.zeros_like(reference)
    if coupled and (len(micros) > 1 or batch.ranks.size > 1):
        with torch.no_grad():
            for micro in micros:
                known[micro.tokens] = log_probs(model, micro, batch.ids[micro.tokens]) - reference[micro.tokens]
        batch.ranks.sum_(known)
    found = torch.zeros_like(reference)
    for micro in micros:
        logp = log_probs(model, micro, batch.ids[micro.tokens])
        found[micro.tokens] = logp.detach()
        known[micro.tokens] = logp.detach() - reference[micro.tokens]
        leaf = known.clone().requires_grad_()
        (upstream,) = torch.autograd.grad(loss_of(leaf), leaf)
        logp.backward(upstream[micro.tokens])
    return found
