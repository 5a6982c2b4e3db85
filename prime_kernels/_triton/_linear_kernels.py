"""Product of hidden states and a head fused with the softmax of its logits, which exist only in registers.

The kernel is persistent: as many programs as the device holds process all tiles (some tokens x part of the vocabulary).
Consecutive tiles use the same part of the head, which stays in the L2 cache. A tile processes its part in blocks: a
product accumulated in float32, then the online softmax on the accumulator, never on a rounded copy. Each row's partial
results (maximum, sum, weighted sum, the target's logit) are merged by the combine kernel of _log_probs_kernels, as for
split rows.
"""

import triton
import triton.language as tl

from prime_kernels._triton._log_probs_kernels import LOG2E, _take


@triton.jit(do_not_specialize=["rows"])
def linear_forward_kernel(
    hidden,
    weight,
    bias_ptr,
    ids_ptr,
    inverse: tl.float32,
    partial_ptr,
    rows,
    vocabulary,
    width,
    chunk,
    BIAS: tl.constexpr,
    ENTROPY: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """hidden [rows, width] and weight [vocabulary, width] are tensor descriptors; elements out of range read as 0."""
    scale = inverse * LOG2E
    row_blocks = tl.cdiv(rows, BLOCK_ROWS)
    field = rows.to(tl.int64) * SPLITS
    for tile in tl.range(tl.program_id(0), row_blocks * SPLITS, PROGRAMS):
        first_row = tile % row_blocks * BLOCK_ROWS
        split = tile // row_blocks
        row = first_row + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        id = tl.load(ids_ptr + row, mask=inside, other=-1).to(tl.int32)
        highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_ROWS], tl.float32)
        weighted = tl.zeros([BLOCK_ROWS], tl.float32)
        target = tl.zeros([BLOCK_ROWS], tl.float32)
        end = tl.minimum(split * chunk + chunk, vocabulary)
        for first_column in tl.range(split * chunk, end, BLOCK_COLUMNS):
            z = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            for k in tl.range(0, width, BLOCK_WIDTH):
                a = hidden.load([first_row, k])
                b = weight.load([first_column, k])
                z = tl.dot(a, b.T, z, input_precision="ieee")
            column = first_column + tl.arange(0, BLOCK_COLUMNS)
            if BIAS:
                z += tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)[None, :]
            is_target = column[None, :] == id[:, None]
            target += tl.sum(tl.where(is_target, z, 0.0), axis=1)
            # Columns beyond the vocabulary get probability 0; the target is added at the end, in float64.
            z = tl.where(is_target | (column >= vocabulary)[None, :], float("-inf"), z)
            highest, total, weighted = _take(z, highest, total, weighted, scale, ENTROPY)
        part_ptr = partial_ptr + row.to(tl.int64) * SPLITS + split
        tl.store(part_ptr, highest, mask=inside)
        tl.store(part_ptr + field, total, mask=inside)
        tl.store(part_ptr + 2 * field, weighted, mask=inside)
        tl.store(part_ptr + 3 * field, target, mask=inside)
