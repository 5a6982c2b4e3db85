"""Pack and unpack. Elements are copied as integers of the same size."""

import triton
import triton.language as tl

from prime_kernels._triton._segmented_scan import segment_of


@triton.jit(do_not_specialize=["total", "rows", "length"])
def pack_kernel(
    padded_ptr,
    cu_ptr,
    out_ptr,
    total: tl.int64,
    rows,
    length: tl.int64,
    width,
    LEFT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """padded [rows, length, width] to out [total, width]; a program copies WIDTH elements of TOKENS tokens."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    row = segment_of(cu_ptr, token, 0, rows - 1)
    place = token - tl.load(cu_ptr + row)
    if LEFT:
        place += length - (tl.load(cu_ptr + row + 1) - tl.load(cu_ptr + row))
    source = (row * length + place) * width
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (token < total)[:, None] & (element < width)[None, :]
    value = tl.load(padded_ptr + source[:, None] + element[None, :], mask=inside)
    tl.store(out_ptr + (token * width)[:, None] + element[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["places", "length", "fill"])
def unpack_kernel(
    values_ptr,
    cu_ptr,
    out_ptr,
    places: tl.int64,
    length: tl.int64,
    width,
    fill: tl.int64,
    LEFT: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """values [N, width] to out [rows, length, width], which has ``places`` = rows * length; ``fill`` between them."""
    at = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = at < places
    row = at // length
    start = tl.load(cu_ptr + row, mask=inside, other=0)
    count = tl.load(cu_ptr + row + 1, mask=inside, other=0) - start
    place = at - row * length
    if LEFT:
        place -= length - count
    there = (place >= 0) & (place < count)
    element = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_width = (element < width)[None, :]
    source = ((start + place) * width)[:, None] + element[None, :]
    value = tl.load(values_ptr + source, mask=there[:, None] & in_width, other=0)
    padding = (tl.zeros([TOKENS, WIDTH], tl.int64) + fill).to(values_ptr.dtype.element_ty)
    value = tl.where(there[:, None], value, padding)
    tl.store(out_ptr + (at * width)[:, None] + element[None, :], value, mask=inside[:, None] & in_width)
