"""Padded rows to packed tokens and back, bit for bit."""

import pytest
import torch
from helpers.support import offsets

from prime_kernels._triton import pack as kernels
from prime_kernels._triton._launch_config import PackConfig

LENGTHS = [0, 3, 0, 11, 1, 12, 0]
LENGTH, TOTAL = 12, sum(LENGTHS)
DTYPES = [torch.bool, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.int64, torch.float64]
# Four tokens and two elements a program: several of each.
SMALL = PackConfig(tokens=4, width=2, num_warps=1)


def columns(row, left):
    return slice(LENGTH - LENGTHS[row], LENGTH) if left else slice(0, LENGTHS[row])


@pytest.mark.parametrize("config", [None, SMALL], ids=["own", "small"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_there_and_back(dtype, left, config):
    for width in (1, 3):
        padded = torch.randint(-100, 100, (len(LENGTHS), LENGTH, width)).to(dtype)
        want = torch.cat([padded[row, columns(row, left)] for row in range(len(LENGTHS))])
        packed = kernels.pack_tokens(padded, offsets(LENGTHS), TOTAL, left, config)
        assert packed.dtype == dtype and torch.equal(packed, want)
        for fill in [True] if dtype == torch.bool else [0, -100]:
            back = torch.full_like(padded, fill)
            for row in range(len(LENGTHS)):
                back[row, columns(row, left)] = padded[row, columns(row, left)]
            got = kernels.unpack_tokens(packed, offsets(LENGTHS), LENGTH, left, fill, config)
            assert got.dtype == dtype and torch.equal(got, back)


def test_bits_are_kept():
    """NaN with a payload, -0 and fills that no integer is."""
    bits = torch.tensor([0x7FC00001, -0x80000000, 0x7F800000], dtype=torch.int32)
    values = bits.view(torch.float32)[:, None]
    got = kernels.unpack_tokens(values, offsets([1, 2]), 3, True, float("-inf"))
    want = [[-0x800000, -0x800000, 0x7FC00001], [-0x800000, -0x80000000, 0x7F800000]]
    assert got[..., 0].view(torch.int32).tolist() == want
    assert torch.equal(kernels.pack_tokens(got, offsets([1, 2]), 3, True).view(torch.int32)[:, 0], bits)


def test_strides():
    padded = torch.randn(3, 8, 4).transpose(0, 1)[..., ::2]
    want = torch.cat([padded[row, :2] for row in range(8)])
    assert torch.equal(kernels.pack_tokens(padded, offsets([2] * 8), 16, False), want)


@pytest.mark.parametrize("shape", [(0, 5, 2), (3, 0, 2), (3, 5, 2), (3, 5, 0)], ids=str)
def test_nothing_to_move(shape):
    rows, length, width = shape
    cu = offsets([0] * rows)
    assert kernels.pack_tokens(torch.ones(shape), cu, 0, False).shape == (0, width)
    got = kernels.unpack_tokens(torch.ones(0, width), cu, length, False, 7.0)
    assert got.shape == shape and (got == 7.0).all()
