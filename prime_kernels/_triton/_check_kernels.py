"""All checks of a batch's values in one launch, as device-side assertions: no check waits for the GPU.

With debug=True Triton compiles the assertions of a kernel; without it they vanish. Copies in the types that the other
kernels take are made in the same pass.
"""

import triton
import triton.language as tl


@triton.jit
def _finite(values_ptr, use, at, MESSAGE: tl.constexpr):
    """Values where ``use``, which must be finite, and 0 elsewhere."""
    values = tl.load(values_ptr + at, mask=use, other=0.0)
    tl.device_assert(tl.abs(values.to(tl.float64)) < float("inf"), MESSAGE)
    return values


@triton.jit
def _rising(cu_ptr, copy_ptr, at, segments, COPY: tl.constexpr, START: tl.constexpr, ORDER: tl.constexpr):
    """Offsets begin at 0 and do not decrease; with COPY they are written to ``copy`` as int64."""
    inside = at <= segments
    here = tl.load(cu_ptr + at, mask=inside, other=0).to(tl.int64)
    after = tl.load(cu_ptr + at + 1, mask=at < segments, other=0).to(tl.int64)
    tl.device_assert((here == 0) | (at != 0), START)
    tl.device_assert((here <= after) | (at >= segments), ORDER)
    if COPY:
        tl.store(copy_ptr + at, here, mask=inside)
    return here


@triton.jit(debug=True, do_not_specialize=["total", "responses", "groups"])
def check_rloo_kernel(
    rewards_ptr,
    rewards_copy_ptr,
    mask_ptr,
    outcomes_ptr,
    outcomes_copy_ptr,
    cu_ptr,
    cu_copy_ptr,
    groups_ptr,
    groups_copy_ptr,
    total: tl.int64,
    responses: tl.int64,
    groups: tl.int64,
    PROCESS: tl.constexpr,
    MASKED: tl.constexpr,
    COPY_REWARDS: tl.constexpr,
    COPY_OUTCOMES: tl.constexpr,
    COPY_CU: tl.constexpr,
    COPY_GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The conditions of ops/rloo_advantages.py on its tensors, a block of each per program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    cu = _rising(
        cu_ptr, cu_copy_ptr, at, responses, COPY_CU,
        "cu_seqlens: expected to start at 0", "cu_seqlens: expected non-decreasing offsets",
    )  # fmt: skip
    to = _rising(
        groups_ptr, groups_copy_ptr, at, groups, COPY_GROUPS,
        "cu_groups: expected to start at 0", "cu_groups: expected non-decreasing offsets",
    )  # fmt: skip
    tl.device_assert((to == responses) | (at != groups), "cu_groups: expected to end at the number of responses")
    of_response = at < responses
    outcomes = _finite(outcomes_ptr, of_response, at, "outcomes: expected finite values")
    if COPY_OUTCOMES:
        tl.store(outcomes_copy_ptr + at, outcomes.to(tl.float64), mask=of_response)
    if PROCESS:
        tl.device_assert((cu == total) | (at != responses), "cu_seqlens: expected to end at the number of tokens")
        inside = at < total
        use = inside
        if MASKED:
            use = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
        rewards = _finite(rewards_ptr, use, at, "process_rewards: expected finite values")
        if COPY_REWARDS:
            tl.store(rewards_copy_ptr + at, rewards.to(tl.float32), mask=inside)
