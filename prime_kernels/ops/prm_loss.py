"""Losses that train an implicit process reward model from outcomes.

With Delta_i = sum_t q_{i,t}, the log-ratio of a whole response, and a_i its outcome:

    ce   mean_i w_i BCE(sigmoid(beta * Delta_i + s_i), a_i)
    kto  mean_i 1 - sigmoid(beta * (Delta_i - KL)) for wanted, 1 - sigmoid(beta * (KL - Delta_i)) for unwanted,
         with KL = max(0, mean_i Delta_i), a constant
    dpo  mean over pairs -log sigmoid(beta * (Delta_w - Delta_l))
    nca  mean over pairs -log sigmoid(beta * Delta_w)
                         - 0.5 log sigmoid(-beta * Delta_w) - 0.5 log sigmoid(-beta * Delta_l)

Wanted means a_i > 0.5; pairs (w, l) are all wanted x unwanted responses of a group.

With v_{i,t} = beta / t * sum_{u<=t} q_{i,u} + s_i, the value of a prefix by the mean of its t log-ratios:

    prefix  mean_i w_i mean_t -(a_i log sigmoid(v_{i,t} - margin) + (1 - a_i) log(1 - sigmoid(v_{i,t} + margin)))

Its slope in q_{i,u} is the sum over t >= u of the slopes in the prefix sums: a scan in reverse.

The weights w_i (1 if not given) and shifts s_i (0) balance a batch of groups of different difficulty. Equation 15 of
arXiv 2604.13197 has s = logit(mu) and w = 1 - mu for right responses, mu for wrong ones, mu the group's mean outcome.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import PRMBatch
from prime_kernels._constants import PREFIX_BETA, PRM_BALANCED_KINDS, PRM_BETA, PRM_KINDS, PRM_PAIR_KINDS
from prime_kernels._segment_math import (
    indexed_total,
    ordered_pairs,
    pair_accuracy,
    result_dtype,
    segment_index,
    segment_total,
)
from prime_kernels.ops import segment_scan
from prime_kernels.ops.segment_sum import SegmentSum

Scalars = tuple[Tensor, Tensor]


class PRMLoss(NamedTuple):
    """Scalars on the device: the loss and the pair accuracy (without gradient)."""

    loss: Tensor
    pair_accuracy: Tensor


def reference(delta: Tensor, batch: PRMBatch, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """(loss, pair accuracy) by the formulas above from the sums of log-ratios [B], in float64."""
    outcomes, cu_groups, counted = batch.outcomes, batch.cu_groups, batch.cu_seqlens.diff() > 0
    wanted = outcomes > 0.5
    if kind == "ce":
        values = beta * delta if batch.shift is None else beta * delta + batch.shift
        losses = binary_cross_entropy_with_logits(values, outcomes, reduction="none")
        loss = _mean(losses if batch.weights is None else losses * batch.weights, counted)
    elif kind == "kto":
        kl = _mean(delta.detach(), counted).clamp(min=0.0)
        loss = _mean(torch.sigmoid(torch.where(wanted, kl - delta, delta - kl) * beta), counted)
    else:
        assert cu_groups is not None
        better, worse = ordered_pairs(cu_groups, outcomes.numel())
        pairs = wanted[better] & ~wanted[worse] & counted[better] & counted[worse]
        if kind == "dpo":
            losses = -logsigmoid(beta * (delta[better] - delta[worse]))
        else:
            of_better = -logsigmoid(beta * delta) - 0.5 * logsigmoid(-beta * delta)
            losses = of_better[better] - 0.5 * logsigmoid(-beta * delta)[worse]
        loss = _mean(losses, pairs)
    return loss, _accuracy(delta, batch, counted)


def prefix_reference(batch: PRMBatch, beta: float, margin: float) -> tuple[Tensor, Tensor]:
    """(loss, pair accuracy) of every prefix by the formula above, in float64."""
    lengths, total = batch.cu_seqlens.diff(), batch.log_ratio.numel()
    response, counted = segment_index(batch.cu_seqlens, total), lengths > 0
    place = torch.arange(1, total + 1, dtype=torch.int64, device=response.device) - batch.cu_seqlens[:-1][response]
    means = segment_scan.reference(batch.log_ratio.double(), batch.cu_seqlens, 1.0, reverse=False) / place
    values = beta * means if batch.shift is None else beta * means + batch.shift[response]
    right = batch.outcomes[response]
    losses = -right * logsigmoid(values - margin) - (1.0 - right) * logsigmoid(-values - margin)
    per_response = indexed_total(losses, response, lengths.numel()) / lengths.clamp(min=1)
    loss = _mean(per_response if batch.weights is None else per_response * batch.weights, counted)
    scores = segment_total(batch.log_ratio.detach(), batch.cu_seqlens) / lengths.clamp(min=1)
    return loss, _accuracy(scores, batch, counted)


def _accuracy(scores: Tensor, batch: PRMBatch, counted: Tensor) -> Tensor:
    if batch.cu_groups is None:
        return torch.full((), math.nan, dtype=torch.float64, device=scores.device)
    return pair_accuracy(scores.detach(), batch.outcomes, counted, batch.cu_groups)


class ResponseLoss(torch.autograd.Function):
    """The loss on a GPU backend: the forward pass also gives its slope in each response's sum of log-ratios."""

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, batch: PRMBatch, kind: str, beta: float, backend: str) -> Scalars:
        results = _backends.packed_on_gpu(backend).prm_loss_and_slope(batch, kind, beta)
        ctx.save_for_backward(results.slope, batch.cu_seqlens)
        ctx.total, ctx.backend = log_ratio.numel(), backend
        ctx.mark_non_differentiable(results.pair_accuracy)
        return results.loss, results.pair_accuracy

    @staticmethod
    @first_derivative_only("prm_loss")
    def backward(ctx: Any, grad: Tensor, _accuracy: Tensor) -> Gradients:
        slope, cu_seqlens = ctx.saved_tensors
        gradient = _backends.packed(ctx.backend).fill_segments(slope, cu_seqlens, ctx.total, factor=grad)
        return gradient, None, None, None, None


class PrefixLoss(torch.autograd.Function):
    """The loss of every prefix on a backend: the forward pass also gives its slope in each prefix sum."""

    @staticmethod
    def forward(ctx: Any, log_ratio: Tensor, batch: PRMBatch, beta: float, margin: float, backend: str) -> Scalars:
        results = _backends.packed(backend).prefix_loss_and_slope(batch, beta, margin)
        ctx.save_for_backward(results.slope, batch.cu_seqlens)
        ctx.backend = backend
        ctx.mark_non_differentiable(results.pair_accuracy)
        return results.loss, results.pair_accuracy

    @staticmethod
    @first_derivative_only("prm_loss")
    def backward(ctx: Any, grad: Tensor, _accuracy: Tensor) -> Gradients:
        slope, cu_seqlens = ctx.saved_tensors
        scan = _backends.packed(ctx.backend).scan_segments
        return scan(slope, cu_seqlens, 1.0, reverse=True, factor=grad), None, None, None, None


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean over the counted values; 0, still attached to the graph, if there are none."""
    return values.where(counted, 0.0).sum() / counted.sum().clamp(min=1)


def prm_loss(
    log_ratio: Tensor,
    outcomes: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_groups: Tensor | None = None,
    kind: str = "ce",
    beta: float | None = None,
    margin: float = 5.0,
    weights: Tensor | None = None,
    shift: Tensor | None = None,
    backend: str | None = None,
) -> PRMLoss:
    """Loss of an implicit process reward model, and how well it orders responses. Differentiable in ``log_ratio``.

    The formulas are at the top of this file. "ce" and "prefix" take soft labels unchanged; the other kinds call a
    response wanted if its outcome is above 0.5. A response without tokens contributes nothing: it counts in no mean and
    no pair. Without a response, or a pair, the loss is 0 and its gradient zero.

    Pair accuracy: over pairs i < j of a group, sum 1[(S_i > S_j) == (a_i > a_j)] |a_i - a_j| / sum |a_i - a_j| with
    S_i = Delta_i, for "prefix" Delta_i / L_i of L_i tokens; 0.5 for a group of equal outcomes; the mean over groups.

    Args:
        log_ratio: [T], floating point: q_t of each response token, without beta.
        outcomes: [B], floating point, in [0, 1]. Constants.
        cu_seqlens: [B + 1], int32 or int64: where responses start, from 0, non-decreasing, ending at T.
        cu_groups: [G + 1], int32 or int64: where prompt groups start, counted in responses, ending at B. "dpo" and
            "nca" need it. Without it the pair accuracy is NaN: responses to different prompts do not compare. Forming
            the pairs waits for the device once.
        kind: "ce", "dpo", "kto", "nca" or "prefix".
        beta: above 0; None is 10.0 for "prefix", whose values are means over tokens, and 0.05 for the others.
        margin: at least 0: how far beyond the boundary "prefix" wants the values; the other kinds have none.
        weights: [B], floating point, finite: factors of the responses' losses, which do not change what the sum is
            divided by: the responses with tokens. Length times their number / T makes "prefix" the mean over all
            tokens. "ce" and "prefix" only. Constants.
        shift: [B], floating point, finite: added to the responses' values, which moves their boundary. "ce" and
            "prefix" only. Constants.
        backend: see :mod:`prime_kernels`.

    Returns:
        PRMLoss(loss, pair_accuracy), scalars: float32 (float64 for a float64 log_ratio).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, bad offsets, outcomes outside [0, 1] or NaN, an option out of range, no
            groups where they are needed, weights or shifts that are not finite or that the kind does not take.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2412.01981, section 3; arXiv 2305.18290 (dpo), 2402.01306 (kto), 2402.05369 (nca), 2604.13197
    (prefix, equations 9 and 15).
    """
    _checks.floating("log_ratio", log_ratio, ndim=1)
    _checks.floating("outcomes", outcomes, ndim=1)
    _checks.device("outcomes", outcomes, log_ratio, "log_ratio")
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, log_ratio.numel(), "tokens", log_ratio, "log_ratio")
    _checks.shape("outcomes", outcomes, (cu_seqlens.numel() - 1,), "the responses of cu_seqlens")
    _checks.unit_interval("outcomes", outcomes)
    _checks.choice("kind", kind, PRM_KINDS)
    if beta is None:
        beta = PREFIX_BETA if kind == "prefix" else PRM_BETA
    beta = _checks.number("beta", beta, 0.0, math.inf, above_low=True)
    margin = _checks.number("margin", margin, 0.0, math.inf)
    weights, shift = (_per_response(*column, outcomes, kind) for column in (("weights", weights), ("shift", shift)))
    if cu_groups is not None:
        cu_groups = _checks.offsets("cu_groups", cu_groups, outcomes.numel(), "responses", log_ratio, "log_ratio")
    elif kind in PRM_PAIR_KINDS:
        raise ValueError(f"cu_groups: expected the offsets of prompt groups for kind={kind!r}, got None")
    chosen = _dispatch.resolve("prm_loss", log_ratio, backend)
    if chosen != "eager":
        log_ratio = log_ratio.float()
    batch = PRMBatch(log_ratio, outcomes.detach().double(), cu_seqlens, cu_groups, weights, shift)
    if kind == "prefix":
        if chosen != "eager":
            return PRMLoss(*PrefixLoss.apply(log_ratio, batch, beta, margin, chosen))
        loss, accuracy = prefix_reference(batch, beta, margin)
    elif chosen in ("triton", "cuda"):
        return PRMLoss(*ResponseLoss.apply(log_ratio, batch, kind, beta, chosen))
    else:
        summed = chosen == "cpu"
        delta = SegmentSum.apply(log_ratio, cu_seqlens, chosen) if summed else segment_total(log_ratio, cu_seqlens)
        loss, accuracy = reference(delta, batch, kind, beta)
    return PRMLoss(loss.to(result_dtype(log_ratio)), accuracy.to(result_dtype(log_ratio)))


def _per_response(name: str, values: Tensor | None, outcomes: Tensor, kind: str) -> Tensor | None:
    """A float64 constant of each response, or None."""
    if values is None:
        return None
    if kind not in PRM_BALANCED_KINDS:
        raise ValueError(f"{name}: expected None for kind={kind!r}, got a tensor")
    _checks.floating(name, values, ndim=1)
    _checks.like(name, values, outcomes, "outcomes")
    _checks.finite(name, values)
    return values.detach().double()
