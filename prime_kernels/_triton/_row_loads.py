"""Rows of logits at any address, read by 16 bytes: in a vocabulary of 50,257 a row may start at any element.

A lane's columns do not depend on the address. If they were those of an aligned piece instead, which needs no shifting,
sums would have another order at another address: the log-ratio of equal logits would not be exactly 0.
"""

import triton
import triton.language as tl


@triton.jit
def _before(ptr):
    """Elements between ``ptr`` and the 16-byte boundary at or before it."""
    return ((ptr.to(tl.int64) & 15) // (ptr.dtype.element_ty.primitive_bitwidth // 8)).to(tl.int32)


@triton.jit
def to_boundary(ptr, WIDTH: tl.constexpr):
    """Elements, WIDTH to 16 bytes, from ``ptr`` to the 16-byte boundary at or after it."""
    return (WIDTH - _before(ptr)) % WIDTH


@triton.jit
def _columns_of(words):
    """The four columns of words [lanes, 4]."""
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def load_shifted(z_ptr, first, end, LANES: tl.constexpr, WIDTH: tl.constexpr, EDGE: tl.constexpr):
    """Columns [LANES, WIDTH] from ``first`` on of a row at any address, by 16-byte loads.

    Each lane loads the two aligned pieces that its columns lie in and shifts them into place. So a lane has the same
    columns whatever the address of the row, and equal logits give equal bits. With EDGE columns from ``end`` on are of
    no meaning. What is loaded beside the row lies in the same 16 bytes as a part of it.
    """
    before = _before(z_ptr)
    start_ptr = (z_ptr - before).to(tl.pointer_type(tl.int32))
    words_ptr = tl.multiple_of(start_ptr, 16)
    column = first + tl.arange(0, LANES) * WIDTH
    place = column // WIDTH * 4
    words_ptrs = words_ptr + place[:, None] + tl.arange(0, 4)[None, :]
    # Of an aligned row the second piece may lie beyond the tensor.
    if EDGE:
        words = tl.load(words_ptrs, mask=(column - before < end)[:, None], other=0)
        second = (before > 0) & (column - before + WIDTH < end)
        rest = tl.load(words_ptrs + 4, mask=second[:, None], other=0)
    else:
        words = tl.load(words_ptrs)
        rest = tl.load(words_ptrs + 4, mask=before > 0, other=0)
    w0, w1, w2, w3 = _columns_of(words)
    w4, w5, w6, w7 = _columns_of(rest)
    by = before * 4 // WIDTH
    two, one = (by & 2) != 0, (by & 1) != 0
    w0, w1, w2, w3 = tl.where(two, w2, w0), tl.where(two, w3, w1), tl.where(two, w4, w2), tl.where(two, w5, w3)
    w4, w5 = tl.where(two, w6, w4), tl.where(two, w7, w5)
    w0, w1, w2, w3 = tl.where(one, w1, w0), tl.where(one, w2, w1), tl.where(one, w3, w2), tl.where(one, w4, w3)
    if WIDTH == 8:
        w4 = tl.where(one, w5, w4)
        half = (before & 1) != 0
        w0, w1, w2, w3 = _half(half, w0, w1), _half(half, w1, w2), _half(half, w2, w3), _half(half, w3, w4)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [LANES, 4])
    if WIDTH == 4:
        columns = words.to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(z_ptr.dtype.element_ty, bitcast=True)
        high = (words >> 16).to(tl.int16).to(z_ptr.dtype.element_ty, bitcast=True)
        columns = tl.reshape(tl.join(low, high), [LANES, WIDTH]).to(tl.float32)
    return columns


@triton.jit
def _half(half, word, after):
    """The word from the middle of ``word`` on if ``half``."""
    return tl.where(half, ((word >> 16) & 0xFFFF) | (after << 16), word)
