"""Segmented scan over packed tokens: programs get equal token counts, independent of segment lengths.

The recurrence y = x + w * y_before, with w = 0 where a segment begins and else gamma, is an affine map of y_before, and
maps compose associatively: tiles, programs and segments may be cut anywhere. All sums are in float64. "Before" and
"begins" refer to the direction of the scan: with REVERSE a segment begins at its last token, and the first program has
the last tokens.

Where w is 0, what came before is dropped by a select, not by the product: a NaN must not leave its segment.
"""

import triton
import triton.language as tl


@triton.jit
def segment_of(cu_ptr, token, low, high):
    """The segment, int32, of each token of a block, searched in [low, high]; empty segments have no tokens."""
    below = tl.zeros(token.shape, tl.int32) + low
    above = tl.zeros(token.shape, tl.int32) + high
    span = high - low
    while span > 0:
        middle = (below + above + 1) >> 1
        right = tl.load(cu_ptr + middle) <= token
        below = tl.where(right, middle, below)
        above = tl.where(right, above, middle - 1)
        span = span >> 1
    return below


@triton.jit
def program_range(program, total, tiles, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """(first token, end) of a program's range."""
    place = program
    if REVERSE:
        place = tl.num_programs(0) - 1 - program
    first = place.to(tl.int64) * tiles * BLOCK
    return first, tl.minimum(first + tiles * BLOCK, total)


@triton.jit
def segments_of_range(cu_ptr, first, end, segments):
    """The segments of the lowest and of the highest token of a range."""
    token = tl.where(tl.arange(0, 2) == 0, first, end - 1)
    found = segment_of(cu_ptr, token, 0, segments - 1)
    return tl.min(found, axis=0), tl.max(found, axis=0)


@triton.jit
def tile_start(first, count, number, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The lowest token of tile ``number`` of the ``count`` tiles of a range."""
    place = number
    if REVERSE:
        place = count - 1 - number
    return first + place * BLOCK


@triton.jit
def begins(cu_ptr, token, segment, REVERSE: tl.constexpr):
    if REVERSE:
        return tl.load(cu_ptr + segment + 1) == token + 1
    return tl.load(cu_ptr + segment) == token


@triton.jit
def open_part(cu_ptr, first, end, low, high, REVERSE: tl.constexpr):
    """(lowest token, end, begins) of the segment that is still open at the end of the range, in scan direction.

    ``begins`` tells whether it begins in this range. ``low`` and ``high`` are the segments at the ends of the range.
    """
    if REVERSE:
        edge = tl.load(cu_ptr + low + 1)
        return first, tl.minimum(edge, end), edge <= end
    edge = tl.load(cu_ptr + high)
    return tl.maximum(edge, first), end, edge >= first


@triton.jit
def power(log2_gamma, exponent):
    """gamma ** exponent for float64 exponents that are integers and at least 0; 0 ** 0 is 1."""
    # For gamma 0 the logarithm is -inf, and 0 * -inf is NaN.
    return tl.where(exponent == 0.0, 1.0, tl.exp2(tl.maximum(exponent, 1.0) * log2_gamma))


@triton.jit
def weights_to_end(log2_gamma, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The weight of each token of a tile in the running sum at the tile's end."""
    after = tl.arange(0, BLOCK)
    if not REVERSE:
        after = BLOCK - 1 - after
    return power(log2_gamma, after.to(tl.float64))


@triton.jit
def compose(w1, x1, w2, x2):
    return w1 * w2, tl.where(w2 == 0.0, x2, x2 + w2 * x1)


@triton.jit
def compose_pair(w1, x1, c1, w2, x2, c2):
    fresh = w2 == 0.0
    return w1 * w2, tl.where(fresh, x2, x2 + w2 * x1), tl.where(fresh, c2, c2 + w2 * c1)


@triton.jit
def edge_of(y, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """The running sum at the end of a tile."""
    edge = BLOCK - 1
    if REVERSE:
        edge = 0
    return tl.sum(tl.where(tl.arange(0, BLOCK) == edge, y, 0.0), axis=0)


@triton.jit
def step_weights(fresh, gamma, BLOCK: tl.constexpr):
    """The weight w of each token: 0 where a segment begins (``fresh``), else gamma."""
    return tl.where(fresh, 0.0, tl.full([BLOCK], 1.0, tl.float64) * gamma)


@triton.jit
def scan_tile(x, fresh, gamma, carry, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """(running sums, last running sum) of a tile; ``carry`` is the running sum before it."""
    w, y = tl.associative_scan((step_weights(fresh, gamma, BLOCK), x), 0, compose, reverse=REVERSE)
    y = tl.where(w == 0.0, y, y + w * carry)
    return y, edge_of(y, BLOCK, REVERSE)


@triton.jit
def scan_tile_pair(x, c, fresh, gamma, x_carry, c_carry, BLOCK: tl.constexpr, REVERSE: tl.constexpr):
    """As scan_tile, for two columns."""
    w = step_weights(fresh, gamma, BLOCK)
    w, y, n = tl.associative_scan((w, x, c), 0, compose_pair, reverse=REVERSE)
    y = tl.where(w == 0.0, y, y + w * x_carry)
    n = tl.where(w == 0.0, n, n + w * c_carry)
    return y, n, edge_of(y, BLOCK, REVERSE), edge_of(n, BLOCK, REVERSE)


@triton.jit
def publish_open_sum(
    values_ptr,
    cu_ptr,
    published_ptr,
    total,
    segments,
    tiles,
    log2_gamma,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Publish the map (w, x) of this program's range, in which only the segment that is open at its end matters."""
    program = tl.program_id(0)
    # No program needs the last one's map, and only its range may end within a tile.
    if program < tl.num_programs(0) - 1:
        first, end = program_range(program, total, tiles, BLOCK, REVERSE)
        low, high = segments_of_range(cu_ptr, first, end, segments)
        count = tl.cdiv(end - first, BLOCK).to(tl.int32)
        start, stop, fresh = open_part(cu_ptr, first, end, low, high, REVERSE)
        weights = weights_to_end(log2_gamma, BLOCK, REVERSE)
        a_tile = power(log2_gamma, tl.full([1], BLOCK, tl.float64))
        x = tl.zeros([1], tl.float64)
        skipped = ((start - first) // BLOCK).to(tl.int32)
        if REVERSE:
            skipped = count - tl.cdiv(stop - first, BLOCK).to(tl.int32)
        for number in range(skipped, count):
            token = tile_start(first, count, number, BLOCK, REVERSE) + tl.arange(0, BLOCK)
            inside = (token >= start) & (token < stop)
            value = tl.load(values_ptr + token, mask=inside, other=0.0).to(tl.float64)
            x = x * a_tile + tl.sum(value * weights, axis=0)
        w = tl.where(fresh, 0.0, power(log2_gamma, (end - first + tl.zeros([1], tl.int64)).to(tl.float64)))
        one = tl.arange(0, 1)
        tl.store(published_ptr + program + one, w)
        tl.store(published_ptr + SLOTS + program + one, x)


@triton.jit
def carry_in(published_ptr, program, SLOTS: tl.constexpr):
    """The running sum before this program's range, from the maps (w, x) that the programs before it published."""
    slot = tl.arange(0, SLOTS)
    before = slot < program
    w = tl.load(published_ptr + slot, mask=before, other=0.0)
    x = tl.load(published_ptr + SLOTS + slot, mask=before, other=0.0)
    w, x = tl.associative_scan((w, x), 0, compose)
    return tl.sum(tl.where(slot == program - 1, x, 0.0), axis=0)


@triton.jit
def carry_in_pair(published_ptr, program, SLOTS: tl.constexpr):
    """As carry_in, from maps (w, x, c) of two columns."""
    slot = tl.arange(0, SLOTS)
    before = slot < program
    w = tl.load(published_ptr + slot, mask=before, other=0.0)
    x = tl.load(published_ptr + SLOTS + slot, mask=before, other=0.0)
    c = tl.load(published_ptr + 2 * SLOTS + slot, mask=before, other=0.0)
    w, x, c = tl.associative_scan((w, x, c), 0, compose_pair)
    last = slot == program - 1
    return tl.sum(tl.where(last, x, 0.0), axis=0), tl.sum(tl.where(last, c, 0.0), axis=0)


@triton.jit
def wait_for_all(counter_ptr, turn):
    """Grid-wide barrier number ``turn``, from 1: what programs stored before it is visible after it.

    All programs must be resident at once: the launch is cooperative.
    """
    tl.debug_barrier()
    wanted = turn * tl.num_programs(0)
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") + 1
    while arrived < wanted:
        arrived = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()


@triton.jit
def arrives_last(counter_ptr, turns):
    """Whether this program is the last to arrive, after ``turns`` barriers; it resets the counter to 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == (turns + 1) * tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last


@triton.jit
def range_sums(
    values_ptr,
    cu_ptr,
    sums_ptr,
    published_ptr,
    total,
    segments,
    tiles,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Write the sum in this range of each segment whose first token is in it; publish the map (w, x)."""
    program = tl.program_id(0)
    first, end = program_range(program, total, tiles, BLOCK, True)
    low, high = segments_of_range(cu_ptr, first, end, segments)
    count = tl.cdiv(end - first, BLOCK).to(tl.int32)
    carry = tl.sum(tl.zeros([2], tl.float64), axis=0)
    for number in range(count):
        token = tile_start(first, count, number, BLOCK, True) + tl.arange(0, BLOCK)
        inside = token < total
        value = tl.load(values_ptr + token, mask=inside, other=0.0).to(tl.float64)
        segment = segment_of(cu_ptr, token, low, high)
        y, carry = scan_tile(value, begins(cu_ptr, token, segment, True), 1.0, carry, BLOCK, True)
        tl.store(sums_ptr + segment, y, mask=inside & begins(cu_ptr, token, segment, False))
    fresh = tl.load(cu_ptr + low + 1) <= end
    tl.store(published_ptr + program, tl.where(fresh, 0.0, 1.0).to(tl.float64))
    tl.store(published_ptr + SLOTS + program, carry)


@triton.jit
def complete_sums(cu_ptr, sums_ptr, published_ptr, total, segments, tiles, BLOCK: tl.constexpr, SLOTS: tl.constexpr):
    """Complete the sums of segments that span several ranges, for all programs at once."""
    slot = tl.arange(0, SLOTS)
    before = slot < tl.num_programs(0) - 1
    w = tl.load(published_ptr + slot, mask=before, other=0.0)
    x = tl.load(published_ptr + SLOTS + slot, mask=before, other=0.0)
    w, x = tl.associative_scan((w, x), 0, compose)
    # The value at a slot is the carry into the next program, whose range is full.
    first, end = program_range(tl.minimum(slot + 1, tl.num_programs(0) - 1), total, tiles, BLOCK, True)
    segment = segment_of(cu_ptr, end - 1, 0, segments - 1)
    start, stop = tl.load(cu_ptr + segment), tl.load(cu_ptr + segment + 1)
    open = before & (start >= first) & (stop > end)
    tl.store(sums_ptr + segment, tl.load(sums_ptr + segment, mask=open, other=0.0) + x, mask=open)
