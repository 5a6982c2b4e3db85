"""The PRM loss of every prefix of a response and its slopes, by the formula of ops/prm_loss.py.

A scan gives the value of each prefix, and with it the loss and the slope; the last program to finish adds up.
"""

import triton
import triton.language as tl

from prime_kernels._triton._prm_kernels import balance, group_terms, mean_accuracy, sigmoid, softplus
from prime_kernels._triton._segmented_scan import (
    arrives_last,
    begins,
    carry_in,
    program_range,
    publish_open_sum,
    scan_tile,
    segment_of,
    segments_of_range,
    wait_for_all,
)


@triton.jit
def _with_tokens(cu_ptr, responses, RESPONSES: tl.constexpr):
    """The number of responses that have tokens, at least 1."""
    number = tl.zeros([RESPONSES], tl.float64)
    for at in range(0, responses, RESPONSES):
        response = at + tl.arange(0, RESPONSES)
        inside = response < responses
        start = tl.load(cu_ptr + response, mask=inside, other=0)
        number += (tl.load(cu_ptr + response + 1, mask=inside, other=0) > start).to(tl.float64)
    return tl.maximum(tl.sum(number, axis=0), 1.0)


@triton.jit
def _tokens(
    log_ratio_ptr,
    outcomes_ptr,
    cu_ptr,
    weights_ptr,
    shift_ptr,
    slope_ptr,
    scores_ptr,
    published_ptr,
    total,
    responses,
    tiles,
    beta,
    margin,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESPONSES: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Slopes of this program's tokens, scores of responses that end in its range; publishes its part of the loss."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, False)
    low, high = segments_of_range(cu_ptr, first, end, responses)
    number = _with_tokens(cu_ptr, responses, RESPONSES)
    carry = carry_in(published_ptr, program, SLOTS)
    losses = tl.sum(tl.zeros([2], tl.float64), axis=0)
    for tile in range(tl.cdiv(end - first, BLOCK).to(tl.int32)):
        token = first + tile * BLOCK + tl.arange(0, BLOCK)
        inside = token < total
        q = tl.load(log_ratio_ptr + token, mask=inside, other=0.0).to(tl.float64)
        response = segment_of(cu_ptr, token, low, high)
        y, carry = scan_tile(q, begins(cu_ptr, token, response, False), 1.0, carry, BLOCK, False)
        start, stop = tl.load(cu_ptr + response), tl.load(cu_ptr + response + 1)
        length = tl.maximum((stop - start).to(tl.float64), 1.0)
        rate = beta / (token - start + 1).to(tl.float64)
        weight, shift = balance(weights_ptr, shift_ptr, response, inside, WEIGHTED, SHIFTED)
        weight = weight / (length * number)
        value = rate * y + shift
        right = tl.load(outcomes_ptr + response)
        wrong = 1.0 - right
        loss = weight * (right * softplus(margin - value) + wrong * softplus(margin + value))
        losses += tl.sum(tl.where(inside, loss, 0.0), axis=0)
        slope = weight * rate * (wrong * sigmoid(margin + value) - right * sigmoid(margin - value))
        tl.store(slope_ptr + token, slope.to(tl.float32), mask=inside)
        tl.store(scores_ptr + response, y / length, mask=inside & (token + 1 == stop))
    tl.store(published_ptr + 2 * SLOTS + program, losses)


@triton.jit
def _results(
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    loss_ptr,
    accuracy_ptr,
    scores_ptr,
    published_ptr,
    total,
    responses,
    groups,
    GROUPED: tl.constexpr,
    RESPONSES: tl.constexpr,
    SLOTS: tl.constexpr,
):
    slot = tl.arange(0, SLOTS)
    parts = tl.load(published_ptr + 2 * SLOTS + slot, mask=(slot < tl.num_programs(0)) & (total > 0), other=0.0)
    tl.store(loss_ptr, tl.sum(parts, axis=0).to(tl.float32))
    if GROUPED:
        weight_ptr = scores_ptr + responses
        agreed_ptr = weight_ptr + responses
        for at in range(0, responses, RESPONSES):
            response = at + tl.arange(0, RESPONSES)
            _, _, _, weight, agreed = group_terms(
                scores_ptr, outcomes_ptr, cu_ptr, groups_ptr, response, responses, groups, 1.0, "prefix", RESPONSES
            )
            tl.store(weight_ptr + response, weight, mask=response < responses)
            tl.store(agreed_ptr + response, agreed, mask=response < responses)
        tl.debug_barrier()
        accuracy = mean_accuracy(groups_ptr, weight_ptr, agreed_ptr, groups, RESPONSES)
        tl.store(accuracy_ptr, accuracy.to(tl.float32))
    else:
        tl.store(accuracy_ptr, float("nan"))


@triton.jit(do_not_specialize=["total", "responses", "groups", "tiles"])
def prefix_kernel(
    log_ratio_ptr,
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    weights_ptr,
    shift_ptr,
    loss_ptr,
    accuracy_ptr,
    slope_ptr,
    scores_ptr,
    published_ptr,
    counter_ptr,
    total: tl.int64,
    responses,
    groups,
    tiles,
    beta: tl.float64,
    margin: tl.float64,
    GROUPED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SHIFTED: tl.constexpr,
    RESPONSES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Phases FIRST to LAST of: 0, publish the program's map (w, x); 1, losses. One launch if barriers are possible.

    scores is [3, responses]: the responses' scores, and the weight and agreed columns of their pairs. published is
    [3, SLOTS]: w, x and the loss of each program.
    """
    if FIRST == 0:
        if total > 0:
            publish_open_sum(
                log_ratio_ptr, cu_ptr, published_ptr, total, responses, tiles, 0.0, BLOCK, SLOTS, False
            )  # fmt: skip
    if FIRST < LAST:
        wait_for_all(counter_ptr, 1)
    if LAST == 1:
        if total > 0:
            _tokens(
                log_ratio_ptr, outcomes_ptr, cu_ptr, weights_ptr, shift_ptr, slope_ptr, scores_ptr, published_ptr,
                total, responses, tiles, beta, margin, WEIGHTED, SHIFTED, RESPONSES, BLOCK, SLOTS,
            )  # fmt: skip
        if arrives_last(counter_ptr, LAST - FIRST):
            _results(
                outcomes_ptr, cu_ptr, groups_ptr, loss_ptr, accuracy_ptr, scores_ptr, published_ptr, total, responses,
                groups, GROUPED, RESPONSES, SLOTS,
            )  # fmt: skip
