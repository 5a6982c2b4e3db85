"""The probable tokens of rows that _log_probs_kernels.forward_kernel has scored, from the maxima of its lanes."""

import triton
import triton.language as tl


@triton.jit
def _append(x, ids, good, count_ptr, ids_ptr, found_ptr, slots):
    """Add logits ``x`` and their ``ids`` where ``good`` to the row's list, in any order, unless it is full."""
    place = tl.atomic_add(count_ptr + tl.zeros_like(ids), 1, mask=good, sem="relaxed")
    good = good & (place < slots)
    tl.store(ids_ptr + place, ids.to(tl.int64), mask=good)
    tl.store(found_ptr + place, x, mask=good)


@triton.jit(do_not_specialize=["stride", "slots"])
def search_kernel(
    logits_ptr,
    stride: tl.int64,
    inverse: tl.float32,
    log_min_prob: tl.float32,
    ids_ptr,
    mask_ptr,
    lse_ptr,
    lanes_ptr,
    counts_ptr,
    found_ids_ptr,
    found_ptr,
    vocabulary,
    chunk,
    slots,
    MASKED: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Program (row, part of the row): columns with a log-probability of at least ``log_min_prob``. Of its part it reads
    only the lanes of forward_kernel with such a column, at most 1 / min_prob of them, one after another."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if MASKED:
        if tl.load(mask_ptr + row) == 0:
            return
    LANES: tl.constexpr = BLOCK // WIDTH
    lse = tl.load(lse_ptr + row)
    # Two roundings of lse lower. Comparisons with NaN are false: without a distribution there is no candidate.
    bound = tl.where(tl.abs(lse) < float("inf"), log_min_prob + lse - 2.4e-7 * tl.abs(lse), float("nan"))
    z_ptr = logits_ptr + row * stride * ALIGNMENT
    count_ptr, found_ids_ptr, found_ptr = counts_ptr + row, found_ids_ptr + row * slots, found_ptr + row * slots
    id = tl.load(ids_ptr + row)
    if split == 0:
        inside = (id >= 0) & (id < vocabulary)
        target = tl.load(z_ptr + id, mask=inside, other=float("-inf")).to(tl.float32)
        _append(target, id, inside & (target * inverse >= bound), count_ptr, found_ids_ptr, found_ptr, slots)
    id = id.to(tl.int32)
    start = split * chunk
    end = tl.maximum(start, tl.minimum(start + chunk, vocabulary))
    of_lane = start + tl.arange(0, BLOCKS)[:, None] * BLOCK + tl.arange(0, WIDTH)[None, :]
    lanes = tl.arange(0, LANES)
    highest = tl.load(lanes_ptr + (row * SPLITS + split) * LANES + lanes) * inverse
    while tl.max(highest, axis=0) >= bound:
        lane = tl.argmax(highest, axis=0)
        columns = of_lane + lane * WIDTH
        inside = (columns < end) & (columns != id)
        x = tl.load(z_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        _append(x, columns, inside & (x * inverse >= bound), count_ptr, found_ids_ptr, found_ptr, slots)
        highest = tl.where(lanes == lane, float("-inf"), highest)
