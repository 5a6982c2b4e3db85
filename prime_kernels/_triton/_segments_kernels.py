"""Discounted scans, sums and fills over packed segments, one launch each."""

import triton
import triton.language as tl

from prime_kernels._triton._segmented_scan import (
    arrives_last,
    begins,
    carry_in,
    complete_sums,
    program_range,
    publish_open_sum,
    range_sums,
    scan_tile,
    segment_of,
    segments_of_range,
    tile_start,
    wait_for_all,
)


@triton.jit(do_not_specialize=["total", "segments", "tiles"])
def scan_kernel(
    values_ptr,
    cu_ptr,
    factor_ptr,
    out_ptr,
    published_ptr,
    counter_ptr,
    total: tl.int64,
    segments,
    tiles,
    gamma: tl.float64,
    log2_gamma: tl.float64,
    REVERSE: tl.constexpr,
    SCALED: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Phases FIRST to LAST of: 0, publish the program's map (w, x); 1, scan. One launch if barriers are possible."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, REVERSE)
    low, high = segments_of_range(cu_ptr, first, end, segments)
    count = tl.cdiv(end - first, BLOCK).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    if FIRST == 0:
        publish_open_sum(
            values_ptr, cu_ptr, published_ptr, total, segments, tiles, log2_gamma, BLOCK, SLOTS, REVERSE
        )  # fmt: skip
    if FIRST < LAST:
        wait_for_all(counter_ptr, 1)
    if LAST == 1:
        carry = carry_in(published_ptr, program, SLOTS)
        for number in range(count):
            token = tile_start(first, count, number, BLOCK, REVERSE) + lane
            inside = token < total
            value = tl.load(values_ptr + token, mask=inside, other=0.0).to(tl.float64)
            fresh = begins(cu_ptr, token, segment_of(cu_ptr, token, low, high), REVERSE)
            y, carry = scan_tile(value, fresh, gamma, carry, BLOCK, REVERSE)
            if SCALED:
                y *= tl.load(factor_ptr).to(tl.float64)
            tl.store(out_ptr + token, y.to(out_ptr.dtype.element_ty), mask=inside)
    if FIRST < LAST:
        arrives_last(counter_ptr, 1)


@triton.jit(do_not_specialize=["total", "segments", "tiles"])
def sum_kernel(
    values_ptr,
    cu_ptr,
    sums_ptr,
    published_ptr,
    counter_ptr,
    total: tl.int64,
    segments,
    tiles,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    for at in range(tl.program_id(0) * BLOCK, segments, tl.num_programs(0) * BLOCK):
        segment = at + tl.arange(0, BLOCK)
        inside = segment < segments
        start = tl.load(cu_ptr + segment, mask=inside, other=0)
        empty = inside & (tl.load(cu_ptr + segment + 1, mask=inside, other=1) == start)
        tl.store(sums_ptr + segment, tl.zeros([BLOCK], tl.float64), mask=empty)
    range_sums(values_ptr, cu_ptr, sums_ptr, published_ptr, total, segments, tiles, BLOCK, SLOTS)
    if arrives_last(counter_ptr, 0):
        complete_sums(cu_ptr, sums_ptr, published_ptr, total, segments, tiles, BLOCK, SLOTS)


@triton.jit(do_not_specialize=["total", "segments"])
def fill_kernel(
    values_ptr, cu_ptr, factor_ptr, out_ptr, total: tl.int64, segments, SCALED: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values_ptr + segment_of(cu_ptr, token, 0, segments - 1))
    if SCALED:
        value *= tl.load(factor_ptr).to(tl.float64)
    tl.store(out_ptr + token, value.to(tl.float32), mask=token < total)
