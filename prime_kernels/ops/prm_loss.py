"""Losses that train an implicit process reward model from outcomes.

With Delta_i = sum_t q_{i,t}, the log-ratio of a whole response, and a_i its outcome:

    ce   mean_i BCE(sigmoid(beta * Delta_i), a_i)
    kto  mean_i 1 - sigmoid(beta * (Delta_i - KL)) for wanted, 1 - sigmoid(beta * (KL - Delta_i)) for unwanted,
         with KL = max(0, mean_i Delta_i), a constant
    dpo  mean over pairs -log sigmoid(beta * (Delta_w - Delta_l))
    nca  mean over pairs -log sigmoid(beta * Delta_w)
                         - 0.5 log sigmoid(-beta * Delta_w) - 0.5 log sigmoid(-beta * Delta_l)

Wanted means a_i > 0.5; pairs (w, l) are all wanted x unwanted responses of a group.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._constants import PRM_KINDS, PRM_PAIR_KINDS
from prime_kernels._segment_math import indexed_total, result_dtype, segment_index, segment_total
from prime_kernels.ops.segment_sum import SegmentSum


class PRMLoss(NamedTuple):
    """Scalars on the device: the loss and the pair accuracy (without gradient)."""

    loss: Tensor
    pair_accuracy: Tensor


def ordered_pairs(cu_groups: Tensor, responses: int) -> tuple[Tensor, Tensor]:
    """Indices (i, j) of every ordered pair of responses that share a group, i = j included."""
    sizes = cu_groups.diff()
    group = segment_index(cu_groups, responses)
    partners = sizes[group]
    first = torch.repeat_interleave(partners)
    # The partner's index in the group: the position of the pair minus that of the first pair of i.
    rank = torch.arange(first.numel(), dtype=torch.int64, device=first.device) - (partners.cumsum(0) - partners)[first]
    return first, cu_groups[:-1][group][first] + rank


def pair_accuracy(scores: Tensor, outcomes: Tensor, counted: Tensor, cu_groups: Tensor) -> Tensor:
    """Mean over groups of the fraction of pairs i < j in the order of their outcomes, weighted by |a_i - a_j|.

    A group without a pair of different outcomes counts 0.5, and so does a batch without groups.
    """
    groups, responses = cu_groups.numel() - 1, scores.numel()
    first, second = ordered_pairs(cu_groups, responses)
    gap = (outcomes[first] - outcomes[second]).abs()
    gap = gap.where((first < second) & counted[first] & counted[second], 0.0)
    agrees = (scores[first] > scores[second]) == (outcomes[first] > outcomes[second])
    group = segment_index(cu_groups, responses)[first]
    weight = indexed_total(gap, group, groups)
    share = indexed_total(gap * agrees, group, groups) / weight.where(weight > 0, 1.0)
    share = share.where(weight > 0, 0.5)
    return share.mean() if groups else torch.full((), 0.5, dtype=torch.float64, device=scores.device)


def reference(
    delta: Tensor, outcomes: Tensor, cu_seqlens: Tensor, cu_groups: Tensor | None, kind: str, beta: float
) -> tuple[Tensor, Tensor]:
    """(loss, pair accuracy) by the formulas above from the sums of log-ratios [B], in float64."""
    responses = outcomes.numel()
    outcomes, counted = outcomes.detach().double(), cu_seqlens.diff() > 0
    wanted = outcomes > 0.5
    if kind == "ce":
        loss = _mean(binary_cross_entropy_with_logits(beta * delta, outcomes, reduction="none"), counted)
    elif kind == "kto":
        kl = _mean(delta.detach(), counted).clamp(min=0.0)
        loss = _mean(torch.sigmoid(torch.where(wanted, kl - delta, delta - kl) * beta), counted)
    else:
        assert cu_groups is not None
        better, worse = ordered_pairs(cu_groups, responses)
        pairs = wanted[better] & ~wanted[worse] & counted[better] & counted[worse]
        if kind == "dpo":
            losses = -logsigmoid(beta * (delta[better] - delta[worse]))
        else:
            of_better = -logsigmoid(beta * delta) - 0.5 * logsigmoid(-beta * delta)
            losses = of_better[better] - 0.5 * logsigmoid(-beta * delta)[worse]
        loss = _mean(losses, pairs)
    if cu_groups is None:
        accuracy = torch.full((), math.nan, dtype=torch.float64, device=delta.device)
    else:
        accuracy = pair_accuracy(delta.detach(), outcomes, counted, cu_groups)
    return loss, accuracy


class ResponseLoss(torch.autograd.Function):
    """The loss on a GPU backend: the forward pass also gives its slope in each response's sum of log-ratios."""

    @staticmethod
    def forward(
        ctx: Any,
        log_ratio: Tensor,
        outcomes: Tensor,
        cu_seqlens: Tensor,
        cu_groups: Tensor | None,
        kind: str,
        beta: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = _backends.packed_on_gpu(backend)
        results = kernels.prm_loss_and_slope(log_ratio, outcomes, cu_seqlens, cu_groups, kind, beta)
        ctx.save_for_backward(results.slope, cu_seqlens)
        ctx.total, ctx.backend = log_ratio.numel(), backend
        ctx.mark_non_differentiable(results.pair_accuracy)
        return results.loss, results.pair_accuracy

    @staticmethod
    @first_derivative_only("prm_loss")
    def backward(ctx: Any, grad: Tensor, _accuracy: Tensor) -> Gradients:
        slope, cu_seqlens = ctx.saved_tensors
        gradient = _backends.packed(ctx.backend).fill_segments(slope, cu_seqlens, ctx.total, factor=grad)
        return gradient, None, None, None, None, None, None


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
    beta: float = 0.05,
    backend: str | None = None,
) -> PRMLoss:
    """Loss of an implicit process reward model, and how well it orders responses. Differentiable in ``log_ratio``.

    The formulas are at the top of this file. "ce" takes soft labels unchanged; the other kinds call a response
    wanted if its outcome is above 0.5. A response without tokens contributes nothing: it counts in no mean and no pair.
    Without a response, or a pair, the loss is 0 and its gradient zero.

    Pair accuracy: over pairs i < j of a group, sum 1[(S_i > S_j) == (a_i > a_j)] |a_i - a_j| / sum |a_i - a_j| with
    S_i = Delta_i; 0.5 for a group of equal outcomes; the mean over groups.

    Args:
        log_ratio: [T], floating point: q_t of each response token, without beta.
        outcomes: [B], floating point, in [0, 1]. Constants.
        cu_seqlens: [B + 1], int32 or int64: where responses start, from 0, non-decreasing, ending at T.
        cu_groups: [G + 1], int32 or int64: where prompt groups start, counted in responses, ending at B. "dpo" and
            "nca" need it. Without it the pair accuracy is NaN: responses to different prompts do not compare. Forming
            the pairs waits for the device once.
        kind: "ce", "dpo", "kto" or "nca".
        beta: above 0.
        backend: see :mod:`prime_kernels`.

    Returns:
        PRMLoss(loss, pair_accuracy), scalars: float32 (float64 for a float64 log_ratio).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, bad offsets, outcomes outside [0, 1] or NaN, an option out of range, no
            groups where they are needed.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2412.01981, section 3; arXiv 2305.18290 (dpo), 2402.01306 (kto), 2402.05369 (nca).
    """
    _checks.floating("log_ratio", log_ratio, ndim=1)
    _checks.floating("outcomes", outcomes, ndim=1)
    _checks.device("outcomes", outcomes, log_ratio, "log_ratio")
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, log_ratio.numel(), "tokens", log_ratio, "log_ratio")
    _checks.shape("outcomes", outcomes, (cu_seqlens.numel() - 1,), "the responses of cu_seqlens")
    _checks.unit_interval("outcomes", outcomes)
    _checks.choice("kind", kind, PRM_KINDS)
    beta = _checks.number("beta", beta, 0.0, math.inf, above_low=True)
    if cu_groups is not None:
        cu_groups = _checks.offsets("cu_groups", cu_groups, outcomes.numel(), "responses", log_ratio, "log_ratio")
    elif kind in PRM_PAIR_KINDS:
        raise ValueError(f"cu_groups: expected the offsets of prompt groups for kind={kind!r}, got None")
    chosen = _dispatch.resolve("prm_loss", log_ratio, backend)
    if chosen in ("triton", "cuda"):
        outcomes = outcomes.detach().double()
        return PRMLoss(*ResponseLoss.apply(log_ratio.float(), outcomes, cu_seqlens, cu_groups, kind, beta, chosen))
    if chosen == "cpu":
        delta = SegmentSum.apply(log_ratio.float(), cu_seqlens, chosen)
    else:
        delta = segment_total(log_ratio, cu_seqlens)
    loss, accuracy = reference(delta, outcomes, cu_seqlens, cu_groups, kind, beta)
    return PRMLoss(loss.to(result_dtype(log_ratio)), accuracy.to(result_dtype(log_ratio)))
