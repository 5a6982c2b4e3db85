"""Scans, sums and fills by themselves: segments that straddle tiles and programs, or are empty."""

import math

import pytest
import torch
from helpers.support import assert_close, offsets, split

from prime_kernels._triton import segments as kernels
from prime_kernels.ops import segment_scan

# Tiles have 8 tokens, the shares of five programs one or two tiles.
LENGTHS = {
    "straddling": [0, 3, 0, 0, 17, 1, 1, 40, 0, 5, 0],
    "over all programs": [67],
    "on the edges of tiles": [8, 16, 0, 8, 1, 7, 16],
    "single tokens": [1] * 11,
    "one token": [0, 1],
    "one token beyond": [0, 0, 40, 1],
}
each_length = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
both_directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


@both_directions
@each_length
def test_scan(lengths, reverse, cut):
    values, cu = torch.randn(sum(lengths)), offsets(lengths)
    for gamma, programs in ((1.0, 5), (0.95, 5), (0.95, 1)):
        got = kernels.scan_segments(values, cu, gamma, reverse, None, cut(values.numel(), programs))
        want = segment_scan.reference(values.double(), cu, gamma, reverse)
        assert got.dtype == torch.float32
        assert_close("sums", got, want)


@both_directions
def test_scan_of_float64(reverse, cut):
    values, cu = torch.randn(67, dtype=torch.float64), offsets(LENGTHS["straddling"])
    for gamma in (0.7, 0.0, 1e-200):
        got = kernels.scan_segments(values, cu, gamma, reverse, None, cut(67))
        assert got.dtype == torch.float64
        assert_close("float64", got, segment_scan.reference(values, cu, gamma, reverse))


@both_directions
def test_scan_of_whole_tiles_and_of_strides(reverse, cut):
    values, cu = torch.randn(80)[::2], offsets([15, 25])
    got = kernels.scan_segments(values, cu, 0.9, reverse, None, cut(40))
    assert_close("sums", got, segment_scan.reference(values.double(), cu, 0.9, reverse))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_bad_values_stay_in_their_segment(cut):
    """Wherever the segment lies: in the midst of a tile, over several shares, at the edges of both."""
    lengths = [3, 21, 8, 1, 34]
    values, cu, config = torch.randn(67), offsets(lengths), cut(67)
    wanted = [kernels.scan_segments(values, cu, 0.9, reverse, None, config).split(lengths) for reverse in (False, True)]
    for segment, bad in enumerate([math.nan, math.inf, math.nan, math.inf, math.nan]):
        broken = values.clone()
        broken[int(cu[segment]) + lengths[segment] // 2] = bad
        others = [number != segment for number in range(len(lengths))]
        for reverse, want in enumerate(wanted):
            got = kernels.scan_segments(broken, cu, 0.9, bool(reverse), None, config).split(lengths)
            assert [torch.equal(*pair) for pair in zip(want, got, strict=True)] == others
        assert kernels.sum_segments(broken, cu, config).isfinite().tolist() == others


@each_length
def test_sum_and_fill(lengths, cut):
    values, config = torch.randn(sum(lengths)), cut(sum(lengths))
    sums = kernels.sum_segments(values, offsets(lengths), config)
    assert sums.dtype == torch.float64
    assert_close("float64", sums, [sum(part) for part in split(values.tolist(), lengths)])
    filled = kernels.fill_segments(sums, offsets(lengths), values.numel(), None, config)
    assert filled.dtype == torch.float32
    want = sums.repeat_interleave(torch.tensor(lengths))
    assert_close("sums", filled, want)
    for factor in (torch.tensor(-0.25), torch.tensor(3.0, dtype=torch.float64)):
        filled = kernels.fill_segments(sums, offsets(lengths), values.numel(), factor, config)
        assert_close("sums", filled, want * factor.double())


def test_sums_of_many_empty_segments(cut):
    """More segments than programs look at in one step, nearly all of them empty."""
    lengths = [0] * 60 + [5, 9] + [0] * 60 + [20]
    values = torch.randn(34)
    sums = kernels.sum_segments(values, offsets(lengths), cut(34))
    assert_close("float64", sums, [sum(part) for part in split(values.tolist(), lengths)])


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=["no segments", "empty segments"])
def test_without_tokens(lengths):
    values, cu = torch.empty(0), offsets(lengths)
    assert kernels.scan_segments(values, cu, 0.9, True).shape == (0,)
    assert kernels.sum_segments(values, cu).tolist() == [0.0] * len(lengths)
    assert kernels.fill_segments(torch.ones(len(lengths), dtype=torch.float64), cu, 0).shape == (0,)


def test_configuration_of_the_library():
    """Tiles of full size; results are the same bits again."""
    values, cu = torch.randn(5000), offsets([1, 2047, 0, 2500, 452])
    for reverse in (False, True):
        got = kernels.scan_segments(values, cu, 0.99, reverse)
        assert_close("sums", got, segment_scan.reference(values.double(), cu, 0.99, reverse))
        assert torch.equal(got, kernels.scan_segments(values, cu, 0.99, reverse))
    sums = kernels.sum_segments(values, cu)
    assert_close("float64", sums, [sum(part) for part in split(values.tolist(), cu.diff().tolist())])
