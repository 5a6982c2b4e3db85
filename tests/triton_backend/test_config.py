"""The launch configuration is a pure function: no GPU and no triton needed."""

import pytest

from prime_kernels._triton._config import MAX_SPLITS, Config, Device, choose

H100, A100 = Device(132, (9, 0)), Device(108, (8, 0))


def test_blocks_of_many_rows():
    assert choose(8192, 151936, 2, H100) == Config(block=8192, num_warps=8, num_stages=1, splits=1)
    assert choose(8192, 151936, 4, H100) == Config(block=4096, num_warps=8, num_stages=1, splits=1)
    assert choose(8192, 151936, 2, A100) == Config(block=4096, num_warps=4, num_stages=1, splits=1)


@pytest.mark.parametrize("vocabulary, block", [(1, 128), (128, 128), (129, 256), (4097, 8192), (8193, 8192)])
def test_blocks_of_small_vocabularies(vocabulary, block):
    config = choose(8192, vocabulary, 2, H100)
    assert config.block == block and config.num_warps in (1, 2, 4, 8) and config.splits == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 50, 100, 132, 264, 265, 528, 529])
@pytest.mark.parametrize("vocabulary", [1, 8192, 8193, 50257, 151936])
def test_few_rows_are_split(rows, vocabulary):
    config = choose(rows, vocabulary, 2, H100)
    blocks = -(-vocabulary // config.block)
    assert config.splits & (config.splits - 1) == 0 and 1 <= config.splits <= min(blocks, MAX_SPLITS)
    assert rows * config.splits <= max(rows, 4 * 132)
    if config.splits < min(blocks, MAX_SPLITS) // 2:
        assert rows * config.splits * 2 > 4 * 132


def test_configurations_are_few():
    """A kernel is compiled once for each: row counts must not multiply them."""
    seen = {choose(rows, 151936, 2, H100) for rows in range(20000)}
    assert len(seen) <= 6
