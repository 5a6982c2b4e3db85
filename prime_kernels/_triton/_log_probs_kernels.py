"""Token log-probabilities and their gradient: an online softmax in float32 that reads each row once.

With T the temperature, the running sums are sum 2^t and sum t 2^t with t = (z - highest) log2(e) / T. Each lane of a
program keeps its own sums and loads 16 bytes of neighbouring columns at a time, so the loop needs no barrier; one of
every nine exponentials (five in float32) rescales the sums.

The target is excluded from this pass and added at the end in float64. Otherwise, where the target's probability is near
1, float32 would round away the tail of the row, and with it every digit of the log-probability. Sums are rounded near 1
only if another token is the most likely; the entropy then has an absolute error of about 2^-22.

If there are too few rows to fill the device, each is split over several programs and a second kernel merges the parts.
The number of parts changes the last bits of a result, as any order of summation does; it does not vary between runs.
"""

import triton
import triton.language as tl

from prime_kernels._triton._row_loads import load_shifted, to_boundary

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# t is clamped here where it multiplies 2^t: 0 * -inf is NaN.
LOWEST = tl.constexpr(-126.0)


@triton.jit
def _take(x, highest, total, weighted, scale, ENTROPY: tl.constexpr):
    """Add columns x [lanes, width] to the softmax of each lane."""
    raised = tl.maximum(highest, tl.max(x, axis=1))
    # A lane with nothing but -inf so far has maximum -inf, and -inf - -inf is NaN.
    shift = tl.where(raised == float("-inf"), 0.0, raised)
    step = (highest - shift) * scale
    factor = tl.exp2(step)
    t = (x - shift[:, None]) * scale
    p = tl.exp2(t)
    if ENTROPY:
        weighted = factor * (weighted + tl.maximum(step, LOWEST) * total)
        weighted += tl.sum(p * tl.maximum(t, LOWEST), axis=1)
    total = factor * total + tl.sum(p, axis=1)
    return raised, total, weighted


@triton.jit
def _join(highest, total, weighted, scale):
    """Merge the softmax sums of n lanes or parts."""
    row_highest = tl.max(highest, axis=0)
    step = (highest - tl.where(row_highest == float("-inf"), 0.0, row_highest)) * scale
    factor = tl.exp2(step)
    weighted = tl.sum(factor * (weighted + tl.maximum(step, LOWEST) * total), axis=0)
    return row_highest, tl.sum(factor * total, axis=0), weighted


@triton.jit
def _store_results(highest, total, weighted, target, inverse, logp_ptr, lse_ptr, entropy_ptr, ENTROPY: tl.constexpr):
    """Add the target, whose logit is ``target``, to the rest of its row and store the results."""
    scale = inverse * LOG2E
    row_highest = tl.maximum(highest, target)
    shift = tl.where(row_highest == float("-inf"), 0.0, row_highest)
    step = (highest - shift) * scale
    factor = tl.exp2(step)
    t = (target - shift) * scale
    p = tl.exp2(t)
    sum_all = (factor * total).to(tl.float64) + p.to(tl.float64)
    log_sum = tl.log(sum_all)
    tl.store(lse_ptr, (row_highest.to(tl.float64) * inverse + log_sum).to(tl.float32))
    # Not target / T - lse: rounding lse to float32 would lose the last digits of the log-probability.
    tl.store(logp_ptr, ((target - row_highest).to(tl.float64) * inverse - log_sum).to(tl.float32))
    if ENTROPY:
        sum_weighted = (factor * (weighted + tl.maximum(step, LOWEST) * total)).to(tl.float64)
        sum_weighted += (p * tl.maximum(t, LOWEST)).to(tl.float64)
        tl.store(entropy_ptr, (log_sum - LN2 * sum_weighted / sum_all).to(tl.float32))


@triton.jit
def _store_zeros(logp_ptr, lse_ptr, entropy_ptr, ENTROPY: tl.constexpr):
    tl.store(logp_ptr, 0.0)
    tl.store(lse_ptr, 0.0)
    if ENTROPY:
        tl.store(entropy_ptr, 0.0)


@triton.jit(do_not_specialize=["rows", "stride_a", "stride_b", "stride_c"])
def forward_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    stride_a: tl.int64,
    stride_b: tl.int64,
    stride_c: tl.int64,
    inverse_a: tl.float32,
    inverse_b: tl.float32,
    inverse_c: tl.float32,
    ids_ptr,
    mask_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    partial_ptr,
    lanes_ptr,
    rows: tl.int64,
    vocabulary,
    chunk,
    MODELS: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    """Program (row, part of the row, model): results, or with SPLITS > 1 the sums of its part.

    With SEARCHED it leaves the maximum of each lane, without the target, for search_kernel. The models a, b, c share
    ids and mask and differ in address, row stride (in multiples of ALIGNMENT columns) and 1 / T. They run through the
    same code, so that equal logits give equal bits.
    """
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    model = tl.program_id(2)
    at = model * rows + row
    if MASKED:
        if tl.load(mask_ptr + row) == 0:
            if SPLITS == 1:
                _store_zeros(logp_ptr + at, lse_ptr + at, entropy_ptr + at, ENTROPY)
            return

    logits_ptr = a_ptr
    stride = stride_a
    inverse = inverse_a
    if MODELS > 1:
        if model == 1:
            logits_ptr = b_ptr
            stride = stride_b
            inverse = inverse_b
    if MODELS > 2:
        if model == 2:
            logits_ptr = c_ptr
            stride = stride_c
            inverse = inverse_c
    z_ptr = logits_ptr + row * stride * ALIGNMENT
    scale = inverse * LOG2E
    id = tl.load(ids_ptr + row)
    target = tl.load(z_ptr + id, mask=(id >= 0) & (id < vocabulary), other=float("nan")).to(tl.float32)
    id = id.to(tl.int32)

    LANES: tl.constexpr = BLOCK // WIDTH
    offsets = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    highest = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    weighted = tl.zeros([LANES], tl.float32)
    start = split * chunk
    end = tl.maximum(start, tl.minimum(start + chunk, vocabulary))
    whole = start + (end - start) // BLOCK * BLOCK
    for first in range(start, whole, BLOCK):
        if ALIGNMENT == 1:
            x = load_shifted(z_ptr, first, vocabulary, LANES, WIDTH, False)
        else:
            x = tl.load(z_ptr + first + offsets).to(tl.float32)
        x = tl.where(offsets == id - first, float("-inf"), x)
        highest, total, weighted = _take(x, highest, total, weighted, scale, ENTROPY)
    if whole < end:
        if ALIGNMENT == 1:
            x = load_shifted(z_ptr, whole, vocabulary, LANES, WIDTH, True)
        else:
            some = whole + tl.arange(0, LANES) * WIDTH < vocabulary
            x = tl.load(z_ptr + whole + offsets, mask=some[:, None], other=0.0).to(tl.float32)
        x = tl.where((offsets == id - whole) | (whole + offsets >= vocabulary), float("-inf"), x)
        highest, total, weighted = _take(x, highest, total, weighted, scale, ENTROPY)

    if SEARCHED:
        tl.store(lanes_ptr + (at * SPLITS + split) * LANES + tl.arange(0, LANES), highest)
    all_highest, all_total, all_weighted = _join(highest, total, weighted, scale)
    if SPLITS == 1:
        _store_results(
            all_highest,
            all_total,
            all_weighted,
            target,
            inverse,
            logp_ptr + at,
            lse_ptr + at,
            entropy_ptr + at,
            ENTROPY,
        )
    else:
        part_ptr = partial_ptr + at * SPLITS + split
        field = MODELS * rows * SPLITS
        tl.store(part_ptr, all_highest)
        tl.store(part_ptr + field, all_total)
        tl.store(part_ptr + 2 * field, all_weighted)
        tl.store(part_ptr + 3 * field, target)


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    partial_ptr,
    inverse_a: tl.float32,
    inverse_b: tl.float32,
    inverse_c: tl.float32,
    mask_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    rows: tl.int64,
    MODELS: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Program (row, model): results from the parts of a row, every one of which has the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    model = tl.program_id(1)
    at = model * rows + row
    if MASKED:
        if tl.load(mask_ptr + row) == 0:
            _store_zeros(logp_ptr + at, lse_ptr + at, entropy_ptr + at, ENTROPY)
            return
    inverse = tl.where(model == 0, inverse_a, tl.where(model == 1, inverse_b, inverse_c))
    parts_ptr = partial_ptr + at * SPLITS + tl.arange(0, SPLITS)
    field = MODELS * rows * SPLITS
    highest = tl.load(parts_ptr)
    total = tl.load(parts_ptr + field)
    weighted = tl.load(parts_ptr + 2 * field)
    target = tl.load(partial_ptr + 3 * field + at * SPLITS)
    all_highest, all_total, all_weighted = _join(highest, total, weighted, inverse * LOG2E)
    _store_results(
        all_highest, all_total, all_weighted, target, inverse, logp_ptr + at, lse_ptr + at, entropy_ptr + at, ENTROPY
    )


@triton.jit
def _gradient_terms(log_p, grad_logp, entropy, grad_entropy, inverse, ENTROPY: tl.constexpr):
    """(gradient of the target, whose log-prob is ``log_p`` in float64; a; b): that of others is p (a + b log2 p)."""
    # 1 - p in float64: in float32 it has no digits left if p is near 1.
    p = tl.exp(log_p)
    at_target = grad_logp * (1.0 - p)
    a = -grad_logp * inverse
    b = 0.0
    if ENTROPY:
        at_target -= grad_entropy * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
        a -= grad_entropy * entropy * inverse
        b = -grad_entropy * LN2 * inverse
    return (at_target * inverse).to(tl.float32), a, b


@triton.jit
def _put_gradient(
    z_ptrs, out_ptrs, inside, is_target, at_target, lse, a, b, inverse, EDGE: tl.constexpr, ENTROPY: tl.constexpr
):
    """p (a + b log2 p) of some columns, and ``at_target`` of the target; with EDGE of those ``inside`` alone."""
    if EDGE:
        x = tl.load(z_ptrs, mask=inside, other=float("-inf")).to(tl.float32)
    else:
        x = tl.load(z_ptrs).to(tl.float32)
    t = (x * inverse - lse) * LOG2E
    p = tl.exp2(t)
    if ENTROPY:
        gradient = p * (a + b * tl.maximum(t, LOWEST))
    else:
        gradient = p * a
    gradient = tl.where(is_target, at_target, gradient).to(out_ptrs.dtype.element_ty)
    if EDGE:
        tl.store(out_ptrs, gradient, mask=inside)
    else:
        tl.store(out_ptrs, gradient)


@triton.jit(do_not_specialize=["stride", "out_stride"])
def backward_kernel(
    logits_ptr,
    out_ptr,
    stride: tl.int64,
    out_stride: tl.int64,
    inverse: tl.float32,
    ids_ptr,
    mask_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    vocabulary,
    chunk,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PEELED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part of the row): d loss / d logits into out, which may be the logits themselves.

    In place is safe: a thread reads each of its columns before it writes it. Of other columns it reads only the target,
    whose value is used by the thread of that column alone.

    With PEELED the logits and out are alike in their rows' addresses modulo 16 bytes. Columns before the first 16-byte
    boundary and after the last one are then left to the first program of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr = logits_ptr + row * stride * ALIGNMENT
    gradient_ptr = out_ptr + row * out_stride * ALIGNMENT
    offsets = tl.arange(0, BLOCK)
    body_ptr = z_ptr
    out_body_ptr = gradient_ptr
    head = 0
    if PEELED:
        if ALIGNMENT == 1:
            head = tl.minimum(to_boundary(z_ptr, WIDTH), vocabulary)
            body_ptr = tl.multiple_of(z_ptr + head, 16)
            out_body_ptr = tl.multiple_of(gradient_ptr + head, 16)
        body = (vocabulary - head) // WIDTH * WIDTH
    else:
        body = vocabulary
    start = tl.program_id(1) * chunk
    end = tl.maximum(start, tl.minimum(start + chunk, body))
    whole = start + (end - start) // BLOCK * BLOCK
    # The columns of the two ends, one after the other.
    place = tl.arange(0, 2 * WIDTH)
    rest = tl.where(place < WIDTH, place, head + body + place - WIDTH)
    outside = (place < head) | ((place >= WIDTH) & (rest < vocabulary))
    has_rest = (tl.program_id(1) == 0) & (body < vocabulary)

    grad_logp = tl.load(grad_logp_ptr + row)
    lse = tl.load(lse_ptr + row)
    # With a finite lse the row has no NaN and no +inf that a zero gradient could hide.
    empty = (grad_logp == 0.0) & (tl.abs(lse) < float("inf"))
    grad_entropy = 0.0
    entropy = 0.0
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        empty = empty & (grad_entropy == 0.0)
    if MASKED:
        empty = empty | (tl.load(mask_ptr + row) == 0)
    if empty:
        for first in range(start, end, BLOCK):
            columns = first + offsets
            tl.store(out_body_ptr + columns, tl.zeros([BLOCK], out_ptr.dtype.element_ty), mask=columns < body)
        if has_rest:
            tl.store(gradient_ptr + rest, tl.zeros([2 * WIDTH], out_ptr.dtype.element_ty), mask=outside)
        return

    id = tl.load(ids_ptr + row)
    target = tl.load(z_ptr + id, mask=(id >= 0) & (id < vocabulary), other=float("nan"))
    id = id.to(tl.int32)
    log_p = target.to(tl.float64) * inverse - lse
    at_target, a, b = _gradient_terms(log_p, grad_logp, entropy, grad_entropy, inverse, ENTROPY)

    if has_rest:
        _put_gradient(
            z_ptr + rest, gradient_ptr + rest, outside, rest == id, at_target, lse, a, b, inverse, True, ENTROPY
        )
    id -= head
    for first in range(start, whole, BLOCK):
        columns = first + offsets
        _put_gradient(
            body_ptr + columns, out_body_ptr + columns, True, offsets == id - first, at_target, lse, a, b, inverse,
            False, ENTROPY,
        )  # fmt: skip
    if whole < end:
        columns = whole + offsets
        _put_gradient(
            body_ptr + columns, out_body_ptr + columns, columns < body, offsets == id - whole, at_target, lse, a, b,
            inverse, True, ENTROPY,
        )  # fmt: skip
