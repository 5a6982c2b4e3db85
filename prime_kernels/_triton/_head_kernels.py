"""Product of hidden states and a head with the softmax of its logits in the epilogue, while they are in registers.

What a gradient needs of the logits is stored, too: themselves in float32 or, half as many bytes, float16 probabilities
q = 2^15 exp((z - m) / T) with m the largest logit of the row in the tile. These have three bits more than a bfloat16
gradient, down to q / 2^15 = 2^-29, where without the factor it would be 2^-14. q of the target is 0: its gradient
follows from its log-probability alone.

Persistent: as many programs as fit take one tile after another of BLOCK_ROWS tokens x BLOCK_COLUMNS of the vocabulary.
GROUP row blocks go over the whole vocabulary before the next ones begin: their hidden states stay in the L2 cache, and
the head is read once a group. A tile leaves its maximum, sum, weighted sum and target of each row, which blocks_kernel
merges. The order of a logit's sum over the width is the same in any tile: equal logits have equal bits in any call.

Most tiles have no target and no end of the vocabulary in them, and skip what these need. Two things that would hide the
epilogue were tried with Triton 3.6 and compile badly for sm_90: with tl.range(flatten=True) that branch makes ptxas
wait after every instruction of the product, and warp_specialize=True has no effect.
"""

import triton
import triton.language as tl

from prime_kernels._triton._log_probs_kernels import LOG2E, LOWEST, _gradient_terms, _join, _store_results

Q_SCALE, Q_LOG2 = tl.constexpr(32768.0), tl.constexpr(15.0)


@triton.jit
def _block(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a tile."""
    group = tile // (GROUP * column_blocks)
    within = tile % (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _softmax(
    z,
    here,
    inside,
    first,
    highest_ptrs,
    sums_ptrs,
    field,
    out_ptrs,
    vocabulary,
    scale,
    SCORED: tl.constexpr,
    ENTROPY: tl.constexpr,
    PROBABILITIES: tl.constexpr,
):
    """The softmax of a tile whose column ``here`` is the target.

    The target is excluded from it and has its own field, 0 where it is elsewhere.
    """
    BLOCK_ROWS: tl.constexpr = z.shape[0]
    BLOCK_COLUMNS: tl.constexpr = z.shape[1]
    column = tl.arange(0, BLOCK_COLUMNS)
    target = tl.zeros([BLOCK_ROWS], tl.float32)
    has_target = tl.max(((here >= 0) & (here < BLOCK_COLUMNS)).to(tl.int32), axis=0) > 0
    if has_target | (first + BLOCK_COLUMNS > vocabulary):
        is_target = column[None, :] == here[:, None]
        target = tl.sum(tl.where(is_target, z, 0.0), axis=1)
        z = tl.where(is_target | (first + column >= vocabulary)[None, :], float("-inf"), z)
    highest = tl.max(z, axis=1)
    tl.store(highest_ptrs, highest, mask=inside)
    if SCORED:
        tl.store(sums_ptrs + 2 * field, target, mask=inside)
    # A row with nothing but -inf has maximum -inf, and -inf - -inf is NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    t = (z - shift[:, None]) * scale
    p = tl.exp2(t)
    if SCORED:
        tl.store(sums_ptrs, tl.sum(p, axis=1), mask=inside)
        if ENTROPY:
            tl.store(sums_ptrs + field, tl.sum(p * tl.maximum(t, LOWEST), axis=1), mask=inside)
    if PROBABILITIES:
        tl.store(out_ptrs, (p * Q_SCALE).to(tl.float16), mask=inside[:, None])


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    hidden,
    weight,
    bias_ptr,
    ids_ptr,
    inverse: tl.float32,
    highest_ptr,
    sums_ptr,
    out_ptr,
    stride: tl.int64,
    rows,
    vocabulary,
    width,
    BIAS: tl.constexpr,
    SCORED: tl.constexpr,
    ENTROPY: tl.constexpr,
    LOGITS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """hidden [rows, width] and weight [vocabulary, width] are tensor descriptors; elements out of range read as 0.

    With LOGITS they are stored in float32, with PROBABILITIES q, [rows, vocabulary] in rows 8 ``stride`` elements apart
    that have room for whole tiles; with SCORED the softmax of each tile. q is of the tiles of this call: another one
    has the same if its vocabulary starts at one of them.
    """
    scale = inverse * LOG2E
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    column_blocks = tl.cdiv(vocabulary, BLOCK_COLUMNS)
    field = rows.to(tl.int64) * column_blocks
    for tile in tl.range(tl.program_id(0), row_blocks * column_blocks, PROGRAMS):
        row_block, column_block = _block(tile, row_blocks, column_blocks, GROUP)
        first_row = row_block * BLOCK_ROWS
        first = column_block * BLOCK_COLUMNS
        column = first + tl.arange(0, BLOCK_COLUMNS)
        z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        if BIAS:  # before the product: after it there are no registers left for the columns of a thread
            z += tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
        for k in tl.range(0, width, BLOCK_WIDTH):
            z = tl.dot(hidden.load([first_row, k]), weight.load([first, k]).T, z)
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        out_ptrs = (out_ptr + row.to(tl.int64) * (stride * 8) + first)[:, None]
        out_ptrs += tl.arange(0, BLOCK_COLUMNS)[None, :]
        if LOGITS:  # first, and in one way for whole tiles and others: then nothing spills
            tl.store(out_ptrs, z, mask=inside[:, None] & (column < vocabulary)[None, :])
        if SCORED or PROBABILITIES:
            here = tl.load(ids_ptr + row, mask=inside, other=-1).to(tl.int32) - first
            at = row.to(tl.int64) * column_blocks + column_block
            _softmax(
                z, here, inside, first, highest_ptr + at, sums_ptr + at, field, out_ptrs, vocabulary, scale,
                SCORED, ENTROPY, PROBABILITIES,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def blocks_kernel(
    highest_ptr,
    sums_ptr,
    inverse: tl.float32,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    rows: tl.int64,
    blocks,
    ENTROPY: tl.constexpr,
    MOST_BLOCKS: tl.constexpr,
):
    """A program's row from the tiles of its vocabulary, one of which has the target's logit."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, MOST_BLOCKS)
    inside = block < blocks
    at = row * blocks + block
    field = rows * blocks
    highest = tl.load(highest_ptr + at, mask=inside, other=float("-inf"))
    total = tl.load(sums_ptr + at, mask=inside, other=0.0)
    weighted = tl.load(sums_ptr + field + at, mask=inside, other=0.0)
    target = tl.sum(tl.load(sums_ptr + 2 * field + at, mask=inside, other=0.0), axis=0)
    all_highest, all_total, all_weighted = _join(highest, total, weighted, inverse * LOG2E)
    _store_results(
        all_highest, all_total, all_weighted, target, inverse, logp_ptr + row, lse_ptr + row, entropy_ptr + row, ENTROPY
    )


@triton.jit
def _log2(q):
    """log2 of float16 numbers in float32, within 1.6e-5 (their own rounding makes 7e-4); -127 of 0.

    Exponent, and a polynomial of the mantissa that is exact at both ends: the compiler's own log2 takes three times as
    many instructions, for digits that q does not have, and the kernel then longer than its bytes.
    """
    bits = q.to(tl.int32, bitcast=True)
    x = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    mantissa = x * (1.441917 + x * (-0.7090964 + x * (0.4156059 + x * (-0.1935756 + x * 0.0451491))))
    return ((bits >> 23) - 127).to(tl.float32) + mantissa


@triton.jit(do_not_specialize=["stride"])
def gradient_kernel(
    q_ptr,
    out_ptr,
    stride: tl.int64,
    highest_ptr,
    highest_stride: tl.int64,
    inverse: tl.float32,
    ids_ptr,
    logp_ptr,
    lse_ptr,
    entropy_ptr,
    grad_logp_ptr,
    grad_entropy_ptr,
    vocabulary,
    chunk,
    ENTROPY: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Program (row, part of the row): d loss / d logits in bfloat16 into ``out``, which is q's own memory.

    That is safe: a thread reads each of its columns before it writes it. A loop takes TILES tiles of the product, each
    with its own maximum; rows have whole tiles, so that every transfer is one of 16 bytes.
    """
    row = tl.program_id(0).to(tl.int64)
    q_ptr += row * stride * 8
    out_ptr += row * stride * 8
    highest_ptr += row * highest_stride
    lse = tl.load(lse_ptr + row)
    grad_entropy = 0.0
    entropy = 0.0
    if ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    at_target, a, b = _gradient_terms(
        tl.load(logp_ptr + row).to(tl.float64), tl.load(grad_logp_ptr + row), entropy, grad_entropy, inverse, ENTROPY
    )
    id = tl.load(ids_ptr + row).to(tl.int32)
    tile = tl.arange(0, TILES)
    column = tl.arange(0, BLOCK_COLUMNS)
    offsets = tile[:, None] * BLOCK_COLUMNS + column[None, :]
    start = tl.program_id(1) * chunk
    end = tl.maximum(start, tl.minimum(start + chunk, vocabulary))
    for first in range(start, end, TILES * BLOCK_COLUMNS):
        inside = first + tile * BLOCK_COLUMNS < end
        highest = tl.load(highest_ptr + first // BLOCK_COLUMNS + tile, mask=inside, other=0.0)
        # p = q 2^log_factor
        log_factor = (highest * inverse - lse) * LOG2E - Q_LOG2
        factor = tl.exp2(log_factor)
        q = tl.load(q_ptr + first + offsets, mask=inside[:, None], other=0.0).to(tl.float32)
        if ENTROPY:
            t = _log2(q) + log_factor[:, None]
            gradient = q * factor[:, None] * (a + b * tl.maximum(t, LOWEST))
        else:
            gradient = q * (factor * a)[:, None]
        here = id - first - tile * BLOCK_COLUMNS
        gradient = tl.where(column[None, :] == here[:, None], at_target, gradient)
        tl.store(out_ptr + first + offsets, gradient.to(out_ptr.dtype.element_ty), mask=inside[:, None])
