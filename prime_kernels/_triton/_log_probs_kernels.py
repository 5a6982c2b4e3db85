"""Rows of logits to log-probabilities and back: an online softmax that reads each row once, in float32.

With T the temperature, the running sums are sum 2^t and sum t 2^t with t = (z - highest) log2(e) / T. Each lane of a
program keeps sums of its own and takes 16 bytes of neighbouring columns at a time, so the loop needs no barrier, and of
nine exponentials (five in float32) one only rescales.

The target is left out of the pass and joined at the end, in float64: beside a 1 the tail of a peaked row would be
rounded away, and with it every digit of the log-probability of a token that the model is sure of. Only where the most
likely token is not the target are sums rounded beside a 1; the entropy is then right to about 2^-22 absolute.

Rows that are too few to fill the device are split over programs, and a second kernel joins the parts: their number
changes the last bits of a result, as any other order of a sum does, but not from run to run.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where 2^t vanishes, the factor beside it must stay finite: 0 * -inf is NaN.
LOWEST = tl.constexpr(-126.0)


@triton.jit
def _take(x, highest, total, weighted, scale, ENTROPY: tl.constexpr):
    """Take columns x [lanes, width] into the softmax of each lane."""
    raised = tl.maximum(highest, tl.max(x, axis=1))
    # A lane that has seen nothing but -inf is at -inf, and -inf - -inf must not be formed.
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
    """One softmax out of many [n]."""
    top = tl.max(highest, axis=0)
    step = (highest - tl.where(top == float("-inf"), 0.0, top)) * scale
    factor = tl.exp2(step)
    weighted = tl.sum(factor * (weighted + tl.maximum(step, LOWEST) * total), axis=0)
    return top, tl.sum(factor * total, axis=0), weighted


@triton.jit
def _store_results(highest, total, weighted, target, inverse, logp_ptr, lse_ptr, entropy_ptr, ENTROPY: tl.constexpr):
    """Join the target, whose logit is ``target``, with the rest of its row."""
    scale = inverse * LOG2E
    top = tl.maximum(highest, target)
    shift = tl.where(top == float("-inf"), 0.0, top)
    step = (highest - shift) * scale
    factor = tl.exp2(step)
    t = (target - shift) * scale
    p = tl.exp2(t)
    sum_all = (factor * total).to(tl.float64) + p.to(tl.float64)
    log_sum = tl.log(sum_all)
    tl.store(lse_ptr, (top.to(tl.float64) * inverse + log_sum).to(tl.float32))
    # Not target / T - lse: the float32 lse would cost the log-probability its last digits.
    tl.store(logp_ptr, ((target - top).to(tl.float64) * inverse - log_sum).to(tl.float32))
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
    rows: tl.int64,
    vocabulary,
    chunk,
    MODELS: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    UNIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part of the row, model): results, or with SPLITS > 1 the sums of its part.

    The models a, b, c share ids and mask and differ in address, row stride (in units of UNIT columns) and 1 / T. One
    body serves them all, so that equal logits give equal bits.
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
    z_ptr = logits_ptr + row * stride * UNIT
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
        columns = first + offsets
        x = tl.load(z_ptr + columns).to(tl.float32)
        x = tl.where(offsets == id - first, float("-inf"), x)
        highest, total, weighted = _take(x, highest, total, weighted, scale, ENTROPY)
    if whole < end:
        columns = whole + offsets
        x = tl.load(z_ptr + columns, mask=columns < vocabulary, other=float("-inf")).to(tl.float32)
        x = tl.where(offsets == id - whole, float("-inf"), x)
        highest, total, weighted = _take(x, highest, total, weighted, scale, ENTROPY)

    top, all_total, all_weighted = _join(highest, total, weighted, scale)
    if SPLITS == 1:
        _store_results(
            top, all_total, all_weighted, target, inverse, logp_ptr + at, lse_ptr + at, entropy_ptr + at, ENTROPY
        )
    else:
        part_ptr = partial_ptr + at * SPLITS + split
        field = MODELS * rows * SPLITS
        tl.store(part_ptr, top)
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
    ONE_OWNER: tl.constexpr,
):
    """Program (row, model): results from the parts of a row.

    Every part has the target's logit, or with ONE_OWNER the part that it lies in, and the others 0.
    """
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
    if ONE_OWNER:
        target = tl.sum(tl.load(parts_ptr + 3 * field), axis=0)
    else:
        target = tl.load(partial_ptr + 3 * field + at * SPLITS)
    top, all_total, all_weighted = _join(highest, total, weighted, inverse * LOG2E)
    _store_results(
        top, all_total, all_weighted, target, inverse, logp_ptr + at, lse_ptr + at, entropy_ptr + at, ENTROPY
    )


@triton.jit
def _gradient(x, lse, a, b, inverse, ENTROPY: tl.constexpr):
    """p (a + b log2 p) of the columns x."""
    t = (x * inverse - lse) * LOG2E
    p = tl.exp2(t)
    if ENTROPY:
        return p * (a + b * tl.maximum(t, LOWEST))
    return p * a


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
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part of the row): d loss / d logits into out, which may be the logits themselves.

    In place is safe because a thread reads every element that it uses before it writes it: those of its own columns,
    and the target, whose value matters only to the thread that owns that column.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * chunk
    end = tl.maximum(start, tl.minimum(start + chunk, vocabulary))
    z_ptr = logits_ptr + row * stride * UNIT
    gradient_ptr = out_ptr + row * out_stride * UNIT
    offsets = tl.arange(0, BLOCK)

    grad_logp = tl.load(grad_logp_ptr + row)
    lse = tl.load(lse_ptr + row)
    # A finite lse vouches for the row: no NaN and no infinity hides behind the zero gradient.
    empty = (grad_logp == 0.0) & (tl.abs(lse) < float("inf"))
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        empty = empty & (grad_entropy == 0.0)
    if MASKED:
        empty = empty | (tl.load(mask_ptr + row) == 0)
    if empty:
        for first in range(start, end, BLOCK):
            columns = first + offsets
            zeros = tl.zeros([BLOCK], out_ptr.dtype.element_ty)
            tl.store(gradient_ptr + columns, zeros, mask=columns < vocabulary)
        return

    id = tl.load(ids_ptr + row)
    target = tl.load(z_ptr + id, mask=(id >= 0) & (id < vocabulary), other=float("nan"))
    id = id.to(tl.int32)
    # 1 - p in float64: it loses every digit in float32 where the model is sure.
    log_p = target.to(tl.float64) * inverse - lse
    p = tl.exp(log_p)
    at_target = grad_logp * (1.0 - p)
    a = -grad_logp * inverse
    b = 0.0
    if ENTROPY:
        at_target -= grad_entropy * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
        a -= grad_entropy * entropy * inverse
        b = -grad_entropy * LN2 * inverse
    at_target = (at_target * inverse).to(tl.float32)

    whole = start + (end - start) // BLOCK * BLOCK
    for first in range(start, whole, BLOCK):
        columns = first + offsets
        x = tl.load(z_ptr + columns).to(tl.float32)
        gradient = tl.where(offsets == id - first, at_target, _gradient(x, lse, a, b, inverse, ENTROPY))
        tl.store(gradient_ptr + columns, gradient.to(out_ptr.dtype.element_ty))
    if whole < end:
        columns = whole + offsets
        inside = columns < vocabulary
        x = tl.load(z_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        gradient = tl.where(offsets == id - whole, at_target, _gradient(x, lse, a, b, inverse, ENTROPY))
        tl.store(gradient_ptr + columns, gradient.to(out_ptr.dtype.element_ty), mask=inside)
