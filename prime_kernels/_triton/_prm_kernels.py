"""Losses of an implicit process reward model and their slopes in float64, by the formulas of ops/prm_loss.py.

The responses' sums are computed by programs with equal numbers of tokens; the last one to finish computes the losses.
"""

import triton
import triton.language as tl

from prime_kernels._triton._segmented_scan import arrives_last, complete_sums, range_sums, segment_of


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + e^x) with full precision for small e^x: rounding in u - 1 and in log u cancels in their quotient."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.maximum(u - 1.0, 1e-16)))
    return tl.where(x > 0.0, x, 0.0) + log1p


@triton.jit
def _response(deltas_ptr, outcomes_ptr, cu_ptr, response, use):
    """(delta, outcome, whether it counts) of each response; 0 if it has no tokens or ``use`` is False."""
    length = tl.load(cu_ptr + response + 1, mask=use, other=0) - tl.load(cu_ptr + response, mask=use, other=0)
    counted = use & (length > 0)
    delta = tl.load(deltas_ptr + response, mask=counted, other=0.0)
    return delta, tl.load(outcomes_ptr + response, mask=counted, other=0.0), counted


@triton.jit
def _mean_delta(deltas_ptr, outcomes_ptr, cu_ptr, responses, RESPONSES: tl.constexpr):
    """max(0, mean delta), the KL of "kto"."""
    summed = tl.zeros([RESPONSES], tl.float64)
    number = tl.zeros([RESPONSES], tl.float64)
    for at in range(0, responses, RESPONSES):
        response = at + tl.arange(0, RESPONSES)
        delta, _, counted = _response(deltas_ptr, outcomes_ptr, cu_ptr, response, response < responses)
        summed += delta
        number += counted.to(tl.float64)
    mean = tl.sum(summed, axis=0) / tl.maximum(tl.sum(number, axis=0), 1.0)
    return tl.where(mean < 0.0, 0.0, mean)


@triton.jit
def balance(weights_ptr, shift_ptr, response, use, WEIGHTED: tl.constexpr, SHIFTED: tl.constexpr):
    """(weight, shift) of each response, 1 and 0 where they are not given."""
    weight = tl.full(response.shape, 1.0, tl.float64)
    shift = tl.zeros(response.shape, tl.float64)
    if WEIGHTED:
        weight = tl.load(weights_ptr + response, mask=use, other=0.0)
    if SHIFTED:
        shift = tl.load(shift_ptr + response, mask=use, other=0.0)
    return weight, shift


@triton.jit
def _single_terms(delta, outcome, weight, shift, kl, beta, KIND: tl.constexpr):
    """(loss, slope) of "ce" and "kto", whose losses are per response."""
    if KIND == "ce":
        value = beta * delta + shift
        return weight * (softplus(value) - outcome * value), weight * beta * (sigmoid(value) - outcome)
    sign = tl.where(outcome > 0.5, -1.0, 1.0).to(tl.float64)
    p = sigmoid(sign * beta * (delta - kl))
    return p, sign * beta * p * sigmoid(-sign * beta * (delta - kl))


@triton.jit
def group_terms(
    deltas_ptr,
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    response,
    responses,
    groups,
    beta,
    KIND: tl.constexpr,
    RESPONSES: tl.constexpr,
):
    """(loss, pairs, slope, weight, agreed) of each response with the others of its group.

    Loss and number are those of the pairs in which it is the better response; weight sums the outcome differences of
    the pairs in which it comes first, and agreed those in the right order.
    """
    inside = response < responses
    delta, outcome, counted = _response(deltas_ptr, outcomes_ptr, cu_ptr, response, inside)
    group = segment_of(groups_ptr, response, 0, groups - 1)
    begin = tl.load(groups_ptr + group).to(tl.int32)
    size = tl.where(inside, tl.load(groups_ptr + group + 1).to(tl.int32) - begin, 0)
    wanted = outcome > 0.5
    loss = tl.zeros([RESPONSES], tl.float64)
    pairs = tl.zeros([RESPONSES], tl.float64)
    slope = tl.zeros([RESPONSES], tl.float64)
    weight = tl.zeros([RESPONSES], tl.float64)
    agreed = tl.zeros([RESPONSES], tl.float64)
    partners = tl.zeros([RESPONSES], tl.float64)
    for member in range(tl.max(size, axis=0)):
        other = begin + member
        other_delta, other_outcome, there = _response(deltas_ptr, outcomes_ptr, cu_ptr, other, member < size)
        there = there & counted
        gap = tl.where(there & (other > response), tl.abs(outcome - other_outcome), 0.0)
        weight += gap
        agreed += tl.where((delta > other_delta) == (outcome > other_outcome), gap, 0.0)
        pair = there & (wanted != (other_outcome > 0.5))
        partners += pair.to(tl.float64)
        if KIND == "dpo":
            ahead = beta * tl.where(wanted, delta - other_delta, other_delta - delta)
            loss += tl.where(pair & wanted, softplus(-ahead), 0.0)
            slope += tl.where(pair, sigmoid(-ahead), 0.0)
    if KIND == "dpo":
        slope *= tl.where(wanted, -beta, beta)
        pairs = tl.where(wanted, partners, 0.0)
    if KIND == "nca":
        # Each term depends on one response of the pair: it counts once per partner.
        half = 0.5 * softplus(beta * delta)
        lose = 0.5 * beta * sigmoid(beta * delta)
        some = partners > 0.0
        loss = tl.where(some, partners * tl.where(wanted, softplus(-beta * delta) + half, half), 0.0)
        slope = tl.where(some, partners * tl.where(wanted, lose - beta * sigmoid(-beta * delta), lose), 0.0)
        pairs = tl.where(wanted, partners, 0.0)
    return loss, pairs, slope, weight, agreed


@triton.jit
def mean_accuracy(groups_ptr, weight_ptr, agreed_ptr, groups, RESPONSES: tl.constexpr):
    """Mean over groups of agreed / weight, 0.5 for a group without pairs of different outcomes."""
    accuracies = tl.zeros([RESPONSES], tl.float64)
    for at in range(0, groups, RESPONSES):
        group = at + tl.arange(0, RESPONSES)
        inside = group < groups
        begin = tl.load(groups_ptr + group, mask=inside, other=0)
        size = tl.load(groups_ptr + group + 1, mask=inside, other=0) - begin
        weight = tl.zeros([RESPONSES], tl.float64)
        agreed = tl.zeros([RESPONSES], tl.float64)
        for member in range(tl.max(size, axis=0).to(tl.int32)):
            weight += tl.load(weight_ptr + begin + member, mask=member < size, other=0.0)
            agreed += tl.load(agreed_ptr + begin + member, mask=member < size, other=0.0)
        accuracy = tl.where(weight > 0.0, agreed / tl.where(weight > 0.0, weight, 1.0), 0.5)
        accuracies += tl.where(inside, accuracy, 0.0)
    return tl.where(groups > 0, tl.sum(accuracies, axis=0) / tl.maximum(groups, 1), 0.5)


@triton.jit
def _response_losses(
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    weights_ptr,
    shift_ptr,
    deltas_ptr,
    loss_ptr,
    accuracy_ptr,
    slope_ptr,
    responses,
    groups,
    beta,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESPONSES: tl.constexpr,
):
    PAIRED: tl.constexpr = KIND == "dpo" or KIND == "nca"
    weight_ptr = deltas_ptr + responses
    agreed_ptr = weight_ptr + responses
    kl = 0.0
    if KIND == "kto":
        kl = _mean_delta(deltas_ptr, outcomes_ptr, cu_ptr, responses, RESPONSES)
    losses = tl.zeros([RESPONSES], tl.float64)
    number = tl.zeros([RESPONSES], tl.float64)
    for at in range(0, responses, RESPONSES):
        response = at + tl.arange(0, RESPONSES)
        inside = response < responses
        if GROUPED:
            loss, terms, slope, weight, agreed = group_terms(
                deltas_ptr, outcomes_ptr, cu_ptr, groups_ptr, response, responses, groups, beta, KIND, RESPONSES
            )
            tl.store(weight_ptr + response, weight, mask=inside)
            tl.store(agreed_ptr + response, agreed, mask=inside)
        if not PAIRED:
            delta, outcome, counted = _response(deltas_ptr, outcomes_ptr, cu_ptr, response, inside)
            factor, shift = balance(weights_ptr, shift_ptr, response, inside, WEIGHTED, SHIFTED)
            loss, slope = _single_terms(delta, outcome, factor, shift, kl, beta, KIND)
            loss = tl.where(counted, loss, 0.0)
            slope = tl.where(counted, slope, 0.0)
            terms = counted.to(tl.float64)
        losses += loss
        number += terms
        tl.store(slope_ptr + response, slope, mask=inside)
    count = tl.maximum(tl.sum(number, axis=0), 1.0)
    tl.store(loss_ptr, (tl.sum(losses, axis=0) / count).to(tl.float32))
    tl.debug_barrier()
    for at in range(0, responses, RESPONSES):
        response = at + tl.arange(0, RESPONSES)
        slope = tl.load(slope_ptr + response, mask=response < responses, other=0.0)
        tl.store(slope_ptr + response, slope / count, mask=response < responses)
    if GROUPED:
        accuracy = mean_accuracy(groups_ptr, weight_ptr, agreed_ptr, groups, RESPONSES)
        tl.store(accuracy_ptr, accuracy.to(tl.float32))
    else:
        tl.store(accuracy_ptr, float("nan"))


@triton.jit(do_not_specialize=["total", "responses", "groups", "tiles"])
def prm_kernel(
    log_ratio_ptr,
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    weights_ptr,
    shift_ptr,
    loss_ptr,
    accuracy_ptr,
    slope_ptr,
    deltas_ptr,
    published_ptr,
    counter_ptr,
    total: tl.int64,
    responses,
    groups,
    tiles,
    beta: tl.float64,
    KIND: tl.constexpr,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESPONSES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """deltas is [3, responses]: the responses' sums, and the weight and agreed columns of their pairs."""
    if total > 0:
        range_sums(log_ratio_ptr, cu_ptr, deltas_ptr, published_ptr, total, responses, tiles, BLOCK, SLOTS)
    if arrives_last(counter_ptr, 0):
        if total > 0:
            complete_sums(cu_ptr, deltas_ptr, published_ptr, total, responses, tiles, BLOCK, SLOTS)
            tl.debug_barrier()
        _response_losses(
            outcomes_ptr, cu_ptr, groups_ptr, weights_ptr, shift_ptr, deltas_ptr, loss_ptr, accuracy_ptr, slope_ptr,
            responses, groups, beta, KIND, GROUPED, WEIGHTED, SHIFTED, RESPONSES,
        )  # fmt: skip
