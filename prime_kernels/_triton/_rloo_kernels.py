"""RLOO returns in one pass with grid-wide barriers, and whitening, by the formulas of ops/rloo_advantages.py.

A token's process reward less its baseline is scale * s + shift, with one scale and shift per response. The running sum
that a program publishes is therefore scale * S + shift * C, with the running sums S of rewards and C of their number:
both are published before any scale is known. Masked tokens have no process reward, and theirs is not read.
"""

import triton
import triton.language as tl

from prime_kernels import _constants
from prime_kernels._triton._segmented_scan import (
    arrives_last,
    begins,
    carry_in,
    carry_in_pair,
    open_part,
    power,
    program_range,
    scan_tile,
    scan_tile_pair,
    segment_of,
    segments_of_range,
    tile_start,
    wait_for_all,
    weights_to_end,
)

NORMALIZE_EPS = tl.constexpr(_constants.NORMALIZE_EPS)
WHITEN_EPS = tl.constexpr(_constants.WHITEN_EPS)


@triton.jit
def _reward(rewards_ptr, mask_ptr, token, inside, MASKED: tl.constexpr):
    """(process reward, whether there is one) of each token, float64; 0 without."""
    counted = inside
    if MASKED:
        counted = inside & (tl.load(mask_ptr + token, mask=inside, other=0) != 0)
    return tl.load(rewards_ptr + token, mask=counted, other=0.0).to(tl.float64), counted


@triton.jit
def _publish(
    rewards_ptr,
    mask_ptr,
    cu_ptr,
    published_ptr,
    total,
    segments,
    tiles,
    log2_gamma,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Rows of ``published``: w, sum and number of rewards without discount, then w, sum and number with discount."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, True)
    low, high = segments_of_range(cu_ptr, first, end, segments)
    count = tl.cdiv(end - first, BLOCK).to(tl.int32)
    start, stop, fresh = open_part(cu_ptr, first, end, low, high, True)
    weights = weights_to_end(log2_gamma, BLOCK, True)
    one = tl.arange(0, 1)
    a_tile = power(log2_gamma, tl.full([1], BLOCK, tl.float64))
    plain_sum = tl.zeros([1], tl.float64)
    plain_count = tl.zeros([1], tl.float64)
    gamma_sum = tl.zeros([1], tl.float64)
    gamma_count = tl.zeros([1], tl.float64)
    for number in range(count - tl.cdiv(stop - first, BLOCK).to(tl.int32), count):
        token = tile_start(first, count, number, BLOCK, True) + tl.arange(0, BLOCK)
        reward, counted = _reward(rewards_ptr, mask_ptr, token, (token >= start) & (token < stop), MASKED)
        plain_sum += tl.sum(reward, axis=0)
        plain_count += tl.sum(counted.to(tl.float64), axis=0)
        gamma_sum = gamma_sum * a_tile + tl.sum(reward * weights, axis=0)
        gamma_count = gamma_count * a_tile + tl.sum(tl.where(counted, weights, 0.0), axis=0)
    w = tl.where(fresh, 0.0, power(log2_gamma, (end - first + tl.zeros([1], tl.int64)).to(tl.float64)))
    row_ptr = published_ptr + program + one
    tl.store(row_ptr, tl.where(fresh, 0.0, tl.full([1], 1.0, tl.float64)))
    tl.store(row_ptr + SLOTS, plain_sum)
    tl.store(row_ptr + 2 * SLOTS, plain_count)
    tl.store(row_ptr + 3 * SLOTS, w)
    tl.store(row_ptr + 4 * SLOTS, gamma_sum)
    tl.store(row_ptr + 5 * SLOTS, gamma_count)


@triton.jit
def _moments(
    rewards_ptr,
    mask_ptr,
    cu_ptr,
    published_ptr,
    sums_ptr,
    counts_ptr,
    largest_ptr,
    total,
    segments,
    tiles,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Sum and number of rewards of each response that starts in the range, and the range's largest |suffix sum|."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, True)
    low, high = segments_of_range(cu_ptr, first, end, segments)
    count = tl.cdiv(end - first, BLOCK).to(tl.int32)
    largest = tl.zeros([BLOCK], tl.float64)
    if MASKED:
        carry, carry_count = carry_in_pair(published_ptr, program, SLOTS)
    else:
        carry = carry_in(published_ptr, program, SLOTS)
    for number in range(count):
        token = tile_start(first, count, number, BLOCK, True) + tl.arange(0, BLOCK)
        inside = token < total
        reward, counted = _reward(rewards_ptr, mask_ptr, token, inside, MASKED)
        segment = segment_of(cu_ptr, token, low, high)
        fresh = begins(cu_ptr, token, segment, True)
        starts = inside & begins(cu_ptr, token, segment, False)
        if MASKED:
            y, n, carry, carry_count = scan_tile_pair(
                reward, counted.to(tl.float64), fresh, 1.0, carry, carry_count, BLOCK, True
            )
            tl.store(counts_ptr + segment, n, mask=starts)
        else:
            y, carry = scan_tile(reward, fresh, 1.0, carry, BLOCK, True)
        tl.store(sums_ptr + segment, y, mask=starts)
        largest = tl.maximum(largest, tl.where(inside, tl.abs(y), 0.0))
    tl.store(largest_ptr + program, tl.max(largest, axis=0))


@triton.jit
def _largest_of_all(largest_ptr, SLOTS: tl.constexpr):
    slot = tl.arange(0, SLOTS)
    return tl.max(tl.load(largest_ptr + slot, mask=slot < tl.num_programs(0), other=0.0), axis=0)


@triton.jit
def _mean(sums_ptr, counts_ptr, response, length, inside, factor, MASKED: tl.constexpr):
    """(mean process reward, whether there is any) of each response of ``length`` tokens; 0 without."""
    count = length.to(tl.float64)
    if MASKED:
        count = tl.load(counts_ptr + response, mask=inside & (length > 0), other=0.0)
    with_reward = inside & (count > 0.0)
    total = tl.load(sums_ptr + response, mask=with_reward, other=0.0)
    return tl.where(with_reward, total * factor / tl.maximum(count, 1.0), 0.0), with_reward


@triton.jit
def _leave_one_out(
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    sums_ptr,
    counts_ptr,
    scale_ptr,
    shift_ptr,
    centred_ptr,
    response,
    responses,
    groups,
    factor,
    PROCESS: tl.constexpr,
    MASKED: tl.constexpr,
    PAPER: tl.constexpr,
    RESPONSES: tl.constexpr,
):
    """Scale and shift of process rewards, and outcome less its baseline, of each response of a block."""
    inside = response < responses
    group = segment_of(groups_ptr, response, 0, groups - 1)
    begin = tl.load(groups_ptr + group).to(tl.int32)
    size = tl.where(inside, tl.load(groups_ptr + group + 1).to(tl.int32) - begin, 0)
    outcome_total = tl.zeros([RESPONSES], tl.float64)
    outcome_others = tl.zeros([RESPONSES], tl.float64)
    mean_total = tl.zeros([RESPONSES], tl.float64)
    mean_others = tl.zeros([RESPONSES], tl.float64)
    for member in range(tl.max(size, axis=0)):
        other = begin + member
        use = (member < size) & (other != response)
        length = tl.load(cu_ptr + other + 1, mask=use, other=0) - tl.load(cu_ptr + other, mask=use, other=0)
        counted = use & (length > 0)
        outcome_total += tl.load(outcomes_ptr + other, mask=counted, other=0.0)
        outcome_others += counted.to(tl.float64)
        if PROCESS:
            mean, with_reward = _mean(sums_ptr, counts_ptr, other, length, counted, factor, MASKED)
            mean_total += mean
            mean_others += with_reward.to(tl.float64)
    outcome = tl.load(outcomes_ptr + response, mask=inside, other=0.0)
    tl.store(centred_ptr + response, outcome - outcome_total / tl.maximum(outcome_others, 1.0), mask=inside)
    if PROCESS:
        length = tl.load(cu_ptr + response + 1, mask=inside, other=0) - tl.load(cu_ptr + response, mask=inside, other=0)
        mean, with_reward = _mean(sums_ptr, counts_ptr, response, length, inside, factor, MASKED)
        shift = -mean_total / tl.maximum(mean_others, 1.0)
        scale = tl.zeros([RESPONSES], tl.float64) + factor
        if not PAPER:
            weight = tl.where(mean_others > 0.0, 1.0 / tl.maximum(mean_others, 1.0), 0.0)
            scale += factor * weight
            shift -= weight * mean
        tl.store(scale_ptr + response, scale, mask=inside)
        tl.store(shift_ptr + response, shift, mask=inside)


@triton.jit
def _returns(
    rewards_ptr,
    mask_ptr,
    cu_ptr,
    published_ptr,
    scale_ptr,
    shift_ptr,
    centred_ptr,
    returns_ptr,
    stats_ptr,
    total,
    segments,
    tiles,
    gamma,
    log2_gamma_outcome,
    process_coef,
    outcome_coef,
    PROCESS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Returns of the range and their moments: count, mean, sum of squares about it."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, True)
    low, high = segments_of_range(cu_ptr, first, end, segments)
    count = tl.cdiv(end - first, BLOCK).to(tl.int32)
    if PROCESS:
        carry, carry_count = carry_in_pair(published_ptr + 3 * SLOTS, program, SLOTS)
        # Of the response that continues into this range; a carry of 0 weight if one begins here.
        carry = tl.load(scale_ptr + high) * carry + tl.load(shift_ptr + high) * carry_count
    summed = tl.zeros([BLOCK], tl.float64)
    for number in range(count):
        token = tile_start(first, count, number, BLOCK, True) + tl.arange(0, BLOCK)
        inside = token < total
        segment = segment_of(cu_ptr, token, low, high)
        after = tl.load(cu_ptr + segment + 1) - 1 - token
        value = outcome_coef * tl.load(centred_ptr + segment)
        if log2_gamma_outcome != 0.0:
            value *= power(log2_gamma_outcome, after.to(tl.float64))
        if PROCESS:
            reward, counted = _reward(rewards_ptr, mask_ptr, token, inside, MASKED)
            reward = tl.load(scale_ptr + segment) * reward + tl.load(shift_ptr + segment)
            y, carry = scan_tile(tl.where(counted, reward, 0.0), after == 0, gamma, carry, BLOCK, True)
            value += process_coef * y
        rounded = value.to(tl.float32)
        tl.store(returns_ptr + token, rounded, mask=inside)
        summed += tl.where(inside, rounded.to(tl.float64), 0.0)
    number_of = (end - first).to(tl.float64)
    mean = tl.sum(summed, axis=0) / number_of
    tl.debug_barrier()
    squares = tl.zeros([BLOCK], tl.float64)
    for number in range(count):
        token = tile_start(first, count, number, BLOCK, True) + tl.arange(0, BLOCK)
        inside = token < total
        deviation = tl.load(returns_ptr + token, mask=inside, other=0.0).to(tl.float64) - mean
        squares += tl.where(inside, deviation * deviation, 0.0)
    tl.store(stats_ptr + 3 * program, number_of)
    tl.store(stats_ptr + 3 * program + 1, mean)
    tl.store(stats_ptr + 3 * program + 2, tl.sum(squares, axis=0))


@triton.jit(do_not_specialize=["total", "responses", "groups", "tiles"])
def rloo_kernel(
    rewards_ptr,
    mask_ptr,
    outcomes_ptr,
    cu_ptr,
    groups_ptr,
    returns_ptr,
    stats_ptr,
    published_ptr,
    columns_ptr,
    largest_ptr,
    counter_ptr,
    total: tl.int64,
    responses,
    groups,
    tiles,
    gamma_process: tl.float64,
    log2_gamma_process: tl.float64,
    log2_gamma_outcome: tl.float64,
    process_coef: tl.float64,
    outcome_coef: tl.float64,
    PROCESS: tl.constexpr,
    MASKED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ACROSS: tl.constexpr,
    PAPER: tl.constexpr,
    RESPONSES: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Phases FIRST to LAST of: 0, publish; 1, sums of responses; 2, leave-one-out baselines; 3, returns.

    published is [7, SLOTS]: the rows of _publish and the largest suffix sum of each program. columns is [5, responses]:
    sum and number of rewards, scale, shift, centred outcome. With ACROSS phase 1 writes the largest suffix sum of
    all programs to ``largest``, a scalar, and phase 2 reads it: between the two it is combined over ranks.
    """
    program = tl.program_id(0)
    sums_ptr = columns_ptr
    counts_ptr = sums_ptr + responses
    scale_ptr = counts_ptr + responses
    shift_ptr = scale_ptr + responses
    centred_ptr = shift_ptr + responses
    maxima_ptr = published_ptr + 6 * SLOTS
    if FIRST <= 0:
        # No program needs the last one's map.
        if program < tl.num_programs(0) - 1:
            _publish(
                rewards_ptr, mask_ptr, cu_ptr, published_ptr, total, responses, tiles, log2_gamma_process,
                MASKED, BLOCK, SLOTS,
            )  # fmt: skip
    if FIRST <= 0 and LAST >= 1:
        wait_for_all(counter_ptr, 1)
    if FIRST <= 1 and LAST >= 1:
        _moments(
            rewards_ptr, mask_ptr, cu_ptr, published_ptr, sums_ptr, counts_ptr, maxima_ptr, total, responses, tiles,
            MASKED, BLOCK, SLOTS,
        )  # fmt: skip
        if ACROSS:
            if arrives_last(counter_ptr, LAST - FIRST):
                tl.store(largest_ptr, _largest_of_all(maxima_ptr, SLOTS))
    if FIRST <= 1 and LAST >= 2:
        wait_for_all(counter_ptr, 2 - FIRST)
    if FIRST <= 2 and LAST >= 2:
        factor = tl.sum(tl.full([1], 1.0, tl.float64), axis=0)
        if NORMALIZE:
            if ACROSS:
                factor = 1.0 / (tl.load(largest_ptr) + NORMALIZE_EPS)
            else:
                factor = 1.0 / (_largest_of_all(maxima_ptr, SLOTS) + NORMALIZE_EPS)
        for at in range(program * RESPONSES, responses, tl.num_programs(0) * RESPONSES):
            _leave_one_out(
                outcomes_ptr, cu_ptr, groups_ptr, sums_ptr, counts_ptr, scale_ptr, shift_ptr, centred_ptr,
                at + tl.arange(0, RESPONSES), responses, groups, factor, PROCESS, MASKED, PAPER, RESPONSES,
            )  # fmt: skip
    if FIRST <= 2 and LAST >= 3:
        wait_for_all(counter_ptr, 3 - FIRST)
    if LAST >= 3:
        _returns(
            rewards_ptr, mask_ptr, cu_ptr, published_ptr, scale_ptr, shift_ptr, centred_ptr, returns_ptr, stats_ptr,
            total, responses, tiles, gamma_process, log2_gamma_outcome, process_coef, outcome_coef,
            PROCESS, MASKED, BLOCK, SLOTS,
        )  # fmt: skip
        if FIRST < 3:
            arrives_last(counter_ptr, 3 - FIRST)


@triton.jit(do_not_specialize=["total", "rows"])
def whiten_kernel(values_ptr, stats_ptr, out_ptr, total: tl.int64, rows, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Every program merges the moments (count, mean, squares about it) in the same order: equal bits."""
    counts = tl.zeros([ROWS], tl.float64)
    sums = tl.zeros([ROWS], tl.float64)
    for at in range(0, rows, ROWS):
        row = at + tl.arange(0, ROWS)
        count = tl.load(stats_ptr + 3 * row, mask=row < rows, other=0.0)
        counts += count
        sums += count * tl.load(stats_ptr + 3 * row + 1, mask=row < rows, other=0.0)
    count_all = tl.sum(counts, axis=0)
    mean = tl.sum(sums, axis=0) / tl.maximum(count_all, 1.0)
    squares = tl.zeros([ROWS], tl.float64)
    for at in range(0, rows, ROWS):
        row = at + tl.arange(0, ROWS)
        deviation = tl.load(stats_ptr + 3 * row + 1, mask=row < rows, other=0.0) - mean
        squares += tl.load(stats_ptr + 3 * row, mask=row < rows, other=0.0) * deviation * deviation
        squares += tl.load(stats_ptr + 3 * row + 2, mask=row < rows, other=0.0)
    variance = tl.sum(squares, axis=0) / tl.maximum(count_all - 1.0, 1.0)
    factor = 1.0 / tl.sqrt(variance + WHITEN_EPS)
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values_ptr + token, mask=token < total, other=0.0).to(tl.float64)
    tl.store(out_ptr + token, ((value - mean) * factor).to(tl.float32), mask=token < total)
