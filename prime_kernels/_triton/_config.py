"""Launch configuration of the row kernels: a pure function of sizes and device."""

from dataclasses import dataclass

# Resident programs that fill a multiprocessor: with fewer, memory has idle time that more of them would use.
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_SPLITS = 64
MIN_BLOCK = 128
# A thread takes this many bytes of a block, as 16-byte loads that are under way together.
BYTES_PER_THREAD = 64


@dataclass(frozen=True)
class Device:
    """What the choice depends on; the defaults stand for the interpreter, which runs one program at a time."""

    multiprocessors: int = 1
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Config:
    """Columns of a block, warps of a program, stages of its loop, and programs that share a row."""

    block: int
    num_warps: int
    num_stages: int
    splits: int


def choose(rows: int, vocabulary: int, itemsize: int, device: Device) -> Config:
    """The configuration for ``rows`` rows in all (of every model) of ``vocabulary`` elements of ``itemsize`` bytes.

    Blocks are 16 KiB, 8 KiB before compute capability 9, which has less bandwidth to keep busy; 8,192 columns of
    bfloat16 or 4,096 of float32. Rows are split only where they are too few to fill the device, and into no more parts
    than they have blocks. Reasoned, not yet measured on a GPU.
    """
    block_bytes = 16384 if device.capability >= (9, 0) else 8192
    block = max(MIN_BLOCK, min(power_of_two_from(vocabulary), block_bytes // itemsize))
    num_warps = max(1, block * itemsize // (32 * BYTES_PER_THREAD))
    wanted = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // max(1, rows)
    blocks = -(-vocabulary // block)
    splits = power_of_two_to(max(1, min(wanted, blocks, MAX_SPLITS)))
    return Config(block, num_warps, 1, splits)


def power_of_two_from(value: int) -> int:
    """The lowest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def power_of_two_to(value: int) -> int:
    """The highest power of two that is at most ``value``."""
    return 1 << (value.bit_length() - 1)
