"""The launch configuration is a pure function: no GPU and no triton needed."""

import pytest

from prime_kernels._triton._launch_config import (
    MAX_SPLITS,
    Config,
    Device,
    ScanConfig,
    choose,
    choose_pack,
    choose_scan,
)

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


def test_shares_of_many_tokens():
    want = ScanConfig(block=1024, num_warps=4, tiles=6, programs=245, slots=512, per_multiprocessor=2)
    assert choose_scan(1_500_000, H100) == want and want.registers == 255
    assert choose_scan(1_500_000, A100) == ScanConfig(1024, 4, 7, 210, 256, 2)


@pytest.mark.parametrize("total", [0, 1, 2048, 2049, 4096, 4097, 8193, 540_672, 540_673, 10**6, 2**33])
@pytest.mark.parametrize("device", [H100, A100, Device()])
def test_shares_cover_all_tokens(total, device):
    """Every program has a share that is not empty, and they are resident at once."""
    config = choose_scan(total, device)
    share = config.tiles * config.block
    assert 1 <= config.programs <= 2 * device.multiprocessors <= config.slots
    assert config.registers * 32 * config.num_warps * config.per_multiprocessor <= 65536
    assert (config.programs - 1) * share < max(total, 1) and total <= config.programs * share
    # What a kernel is compiled for does not depend on the number of tokens.
    assert (config.block, config.num_warps, config.slots) == (1024, 4, choose_scan(1, device).slots)


def test_blocks_of_padded_tokens():
    for width in (1, 3, 64, 2048, 4096, 100_000):
        config = choose_pack(width)
        assert config.tokens * config.width == 2048 and config.width >= min(width, 2048)
