"""Product of hidden states and a head with the softmax of its logits in the epilogue, while they are in registers.

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

from prime_kernels._triton._log_probs_kernels import LOG2E, LOWEST, _join, _store_results


@triton.jit
def _block(tile, row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a tile."""
    group = tile // (GROUP * column_blocks)
    within = tile % (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    return group * GROUP + within % size, within // size


@triton.jit
def _softmax(z, id, row, inside, first, at, field, vocabulary, scale, ENTROPY: tl.constexpr):
    """Store the softmax of a tile; the target, excluded from it, has its own field, 0 where it is elsewhere."""
    BLOCK_ROWS: tl.constexpr = z.shape[0]
    BLOCK_COLUMNS: tl.constexpr = z.shape[1]
    column = tl.arange(0, BLOCK_COLUMNS)
    here = id - first
    target = tl.zeros([BLOCK_ROWS], tl.float32)
    has_target = tl.max(((here >= 0) & (here < BLOCK_COLUMNS)).to(tl.int32), axis=0) > 0
    if has_target | (first + BLOCK_COLUMNS > vocabulary):
        is_target = column[None, :] == here[:, None]
        target = tl.sum(tl.where(is_target, z, 0.0), axis=1)
        z = tl.where(is_target | (first + column >= vocabulary)[None, :], float("-inf"), z)
    highest = tl.max(z, axis=1)
    # A row with nothing but -inf has maximum -inf, and -inf - -inf is NaN.
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    t = (z - shift[:, None]) * scale
    p = tl.exp2(t)
    tl.store(at, highest, mask=inside)
    tl.store(at + field, tl.sum(p, axis=1), mask=inside)
    if ENTROPY:
        tl.store(at + 2 * field, tl.sum(p * tl.maximum(t, LOWEST), axis=1), mask=inside)
    tl.store(at + 3 * field, target, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    hidden,
    weight,
    bias_ptr,
    ids_ptr,
    inverse: tl.float32,
    partial_ptr,
    logits_ptr,
    stride: tl.int64,
    rows,
    vocabulary,
    width,
    BIAS: tl.constexpr,
    SCORED: tl.constexpr,
    ENTROPY: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """hidden [rows, width] and weight [vocabulary, width] are tensor descriptors; elements out of range read as 0.

    With KEPT the float32 logits [rows, vocabulary] are stored, in rows 8 ``stride`` elements apart, with SCORED the
    softmax of each tile.
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
        if KEPT:  # first, and in one way for whole tiles and others: then nothing spills
            out_ptrs = (logits_ptr + row.to(tl.int64) * (stride * 8) + first)[:, None]
            out_ptrs += tl.arange(0, BLOCK_COLUMNS)[None, :]
            tl.store(out_ptrs, z, mask=inside[:, None] & (column < vocabulary)[None, :])
        if SCORED:
            id = tl.load(ids_ptr + row, mask=inside, other=-1).to(tl.int32)
            at = partial_ptr + row.to(tl.int64) * column_blocks + column_block
            _softmax(z, id, row, inside, first, at, field, vocabulary, scale, ENTROPY)


@triton.jit(do_not_specialize=["rows"])
def blocks_kernel(
    partial_ptr,
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
    at = partial_ptr + row * blocks + block
    field = rows * blocks
    highest = tl.load(at, mask=inside, other=float("-inf"))
    total = tl.load(at + field, mask=inside, other=0.0)
    weighted = tl.load(at + 2 * field, mask=inside, other=0.0)
    target = tl.sum(tl.load(at + 3 * field, mask=inside, other=0.0), axis=0)
    all_highest, all_total, all_weighted = _join(highest, total, weighted, inverse * LOG2E)
    _store_results(
        all_highest, all_total, all_weighted, target, inverse, logp_ptr + row, lse_ptr + row, entropy_ptr + row, ENTROPY
    )
