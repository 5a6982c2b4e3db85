"""The clipped policy loss and its gradient, with the formulas of ops/ppo_loss.py: float32 tokens, float64 sums."""

import triton
import triton.language as tl

from prime_kernels import _constants
from prime_kernels._triton._log_probs_kernels import LN2, LOG2E
from prime_kernels._triton._segmented_scan import arrives_last, program_range

MAX_LOG_RHO = tl.constexpr(_constants.MAX_LOG_RHO)


@triton.jit
def _exp(x):
    """e^x to about the last bit: the fast 2^t loses digits as |t| grows, so t is split into two parts."""
    t = x.to(tl.float64) * LOG2E
    high = t.to(tl.float32)
    rest = (t - high.to(tl.float64)).to(tl.float32) * LN2
    y = tl.exp2(high)
    # If the exponential or t is infinite, `rest` is meaningless.
    return tl.where(tl.abs(rest) < 1.0, y + y * rest, y)


@triton.jit
def _losses(logp_ptr, old_ptr, advantages_ptr, mask_ptr, token, total, low, high, ceiling, MASKED: tl.constexpr):
    """(log ratio, unclipped loss, loss, whether a bound holds it, whether valid) of a block; 0 where not valid."""
    valid = token < total
    if MASKED:
        valid = valid & (tl.load(mask_ptr + token, mask=valid, other=0) != 0)
    logp = tl.load(logp_ptr + token, mask=valid, other=0.0)
    log_rho = logp - tl.load(old_ptr + token, mask=valid, other=0.0)
    advantage = tl.load(advantages_ptr + token, mask=valid, other=0.0)
    # Selects keep a NaN.
    rho = _exp(tl.where(log_rho > MAX_LOG_RHO, MAX_LOG_RHO, log_rho))
    held = tl.where(rho < low, low, tl.where(rho > high, high, rho))
    free, clipped = -advantage * rho, -advantage * held
    bounded = (advantage < 0.0) & (rho > ceiling)
    loss = tl.where(bounded, -advantage * ceiling, tl.where(clipped > free, clipped, free))
    return log_rho, free, loss, bounded | (clipped > free), valid


@triton.jit(do_not_specialize=["total", "tiles"])
def ppo_forward_kernel(
    logp_ptr,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    mask_ptr,
    denominator_ptr,
    loss_ptr,
    clip_fraction_ptr,
    approx_kl_ptr,
    scale_ptr,
    published_ptr,
    counter_ptr,
    total: tl.int64,
    tiles,
    low: tl.float32,
    high: tl.float32,
    ceiling: tl.float32,
    denominator: tl.float64,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    DENOMINATOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Sums per program, merged by the last program to finish. DENOMINATOR is "count", "number" or "tensor"."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, False)
    summed = tl.zeros([BLOCK], tl.float64)
    log_rho_sum = tl.zeros([BLOCK], tl.float64)
    clipped_count = tl.zeros([BLOCK], tl.int32)
    valid_count = tl.zeros([BLOCK], tl.int32)
    for start in range(first, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        log_rho, _, loss, clips, valid = _losses(
            logp_ptr, old_ptr, advantages_ptr, mask_ptr, token, end, low, high, ceiling, MASKED
        )
        if WEIGHTED:
            loss *= tl.load(weights_ptr + token, mask=valid, other=0.0)
        summed += loss.to(tl.float64)
        log_rho_sum += log_rho.to(tl.float64)
        clipped_count += (clips & valid).to(tl.int32)
        valid_count += valid.to(tl.int32)
    row_ptr = published_ptr + program
    tl.store(row_ptr, tl.sum(summed, axis=0))
    tl.store(row_ptr + SLOTS, tl.sum(log_rho_sum, axis=0))
    tl.store(row_ptr + 2 * SLOTS, tl.sum(clipped_count, axis=0).to(tl.float64))
    tl.store(row_ptr + 3 * SLOTS, tl.sum(valid_count, axis=0).to(tl.float64))
    if arrives_last(counter_ptr, 0):
        slot_ptr = published_ptr + tl.arange(0, SLOTS)
        there = tl.arange(0, SLOTS) < tl.num_programs(0)
        loss = tl.sum(tl.load(slot_ptr, mask=there, other=0.0), axis=0)
        log_rho = tl.sum(tl.load(slot_ptr + SLOTS, mask=there, other=0.0), axis=0)
        clipped = tl.sum(tl.load(slot_ptr + 2 * SLOTS, mask=there, other=0.0), axis=0)
        count = tl.sum(tl.load(slot_ptr + 3 * SLOTS, mask=there, other=0.0), axis=0)
        count = tl.maximum(count, 1.0)
        by = count
        if DENOMINATOR == "number":
            by = tl.sum(tl.full([1], denominator, tl.float64), axis=0)
        if DENOMINATOR == "tensor":
            by = tl.load(denominator_ptr)
        tl.store(loss_ptr, (loss / by).to(tl.float32))
        tl.store(clip_fraction_ptr, (clipped / count).to(tl.float32))
        tl.store(approx_kl_ptr, (-log_rho / count).to(tl.float32))
        tl.store(scale_ptr, 1.0 / by)


@triton.jit(do_not_specialize=["total"])
def ppo_backward_kernel(
    logp_ptr,
    old_ptr,
    advantages_ptr,
    weights_ptr,
    mask_ptr,
    scale_ptr,
    grad_ptr,
    out_ptr,
    total: tl.int64,
    low: tl.float32,
    high: tl.float32,
    ceiling: tl.float32,
    MASKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    factor = (tl.load(grad_ptr).to(tl.float64) * tl.load(scale_ptr)).to(tl.float32)
    log_rho, free, _, clips, valid = _losses(
        logp_ptr, old_ptr, advantages_ptr, mask_ptr, token, total, low, high, ceiling, MASKED
    )
    # d rho / d logp = rho: the unclipped loss is its own derivative; where clipping applies it is 0.
    gradient = free
    if WEIGHTED:
        gradient *= tl.load(weights_ptr + token, mask=valid, other=0.0)
    gradient = tl.where(clips | (log_rho > MAX_LOG_RHO) | ~valid, 0.0, gradient * factor)
    tl.store(out_ptr + token, gradient, mask=token < total)
