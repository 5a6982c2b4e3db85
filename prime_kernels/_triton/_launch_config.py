"""Launch configuration of the row kernels: a pure function of sizes and device."""

from dataclasses import dataclass

# Resident programs that fill a multiprocessor: with fewer, memory has idle time that more of them would use.
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_SPLITS = 64
MIN_BLOCK = 128


@dataclass(frozen=True)
class Device:
    """What the choice depends on; the defaults stand for the interpreter, which runs one program at a time."""

    multiprocessors: int = 1
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Tuning:
    """What bench/tune.py searches: bytes of a block, bytes of it that a thread takes, stages of the loop."""

    block_bytes: int
    bytes_per_thread: int
    num_stages: int


# The first entry whose compute capability a device has at least. Reasoned, not yet measured: a thread has four 16-byte
# loads under way, and blocks are larger where there is more bandwidth to keep busy.
TUNED = {
    (9, 0): Tuning(16384, 64, 1),
    (0, 0): Tuning(8192, 64, 1),
}


@dataclass(frozen=True)
class Config:
    """Columns of a block, warps of a program, stages of its loop, and programs that share a row."""

    block: int
    num_warps: int
    num_stages: int
    splits: int


def choose(rows: int, vocabulary: int, itemsize: int, device: Device, tuning: Tuning | None = None) -> Config:
    """The configuration for ``rows`` rows in all (of every model) of ``vocabulary`` elements of ``itemsize`` bytes.

    Rows are split only where they are too few to fill the device, and into no more parts than they have blocks.
    """
    tuning = tuning or next(found for capability, found in TUNED.items() if device.capability >= capability)
    block = max(MIN_BLOCK, min(power_of_two_from(vocabulary), tuning.block_bytes // itemsize))
    num_warps = max(1, block * itemsize // (32 * tuning.bytes_per_thread))
    wanted = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // max(1, rows)
    blocks = -(-vocabulary // block)
    splits = power_of_two_to(max(1, min(wanted, blocks, MAX_SPLITS)))
    return Config(block, num_warps, tuning.num_stages, splits)


@dataclass(frozen=True)
class LinearConfig:
    """Blocks of a product, warps and stages of its loop, parts of the vocabulary, and programs in all."""

    block_rows: int
    block_columns: int
    block_width: int
    num_warps: int
    num_stages: int
    splits: int
    programs: int


# Whether the product and the softmax of linear_log_probs are one kernel on "triton", or a library product into a tile
# and the row kernel on it. The latter until a committed measurement favours the former.
FUSED_LINEAR = False


def choose_linear(rows: int, vocabulary: int, itemsize: int, device: Device) -> LinearConfig:
    """The configuration for [rows, D] hidden states of ``itemsize`` bytes and a [vocabulary, D] head.

    Reasoned, not yet measured: a 128 x 256 accumulator on 8 warps is what Hopper's tensor cores ask for; smaller ones
    have fewer registers and less shared memory. Tiles are at least twice as many as programs, which evens out the end.
    """
    if itemsize == 4:
        blocks = (64, 64, 32, 4, 2)
    elif device.capability >= (9, 0):
        blocks = (128, 256, 64, 8, 3)
    else:
        blocks = (128, 128, 32, 8, 3)
    row_blocks, column_blocks = -(-rows // blocks[0]), -(-vocabulary // blocks[1])
    wanted = -(-2 * device.multiprocessors // row_blocks)
    splits = power_of_two_from(max(1, min(wanted, column_blocks, MAX_SPLITS)))
    splits = min(splits, MAX_SPLITS, power_of_two_to(column_blocks))
    return LinearConfig(*blocks, splits, min(device.multiprocessors, row_blocks * splits))


def power_of_two_from(value: int) -> int:
    """The lowest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def power_of_two_to(value: int) -> int:
    """The highest power of two that is at most ``value``."""
    return 1 << (value.bit_length() - 1)


@dataclass(frozen=True)
class ShareTuning:
    """Tokens of a tile, warps of a program, and tokens that are worth a program of their own."""

    block: int
    num_warps: int
    worth: int


# Reasoned, not yet measured: four or eight tokens a thread, so that a tile's loads are wide and its doubles fit into
# registers; fewer than two tiles a program would be mostly waiting for the other programs.
SHARES = ShareTuning(block=2048, num_warps=8, worth=4096)


@dataclass(frozen=True)
class ShareConfig:
    """Tokens of a tile, warps of a program, tiles of a program's share of the tokens, programs, and places for what
    the programs publish: a power of two that is at least their number."""

    block: int
    num_warps: int
    tiles: int
    programs: int
    slots: int

    @property
    def registers(self) -> int:
        """Of a thread, at most: one program has a multiprocessor to itself, and need not spill to let in a second."""
        return min(255, 65536 // (32 * self.num_warps))


def choose_shares(total: int, device: Device, tuning: ShareTuning = SHARES) -> ShareConfig:
    """Equal shares of ``total`` tokens in whole tiles, whatever the segments; at most one program a multiprocessor.

    All programs are then resident at once, as a barrier between them needs. Only the number of tiles and programs
    depends on ``total``, and no kernel is compiled anew for these.
    """
    wanted = max(1, min(-(-total // tuning.worth), device.multiprocessors))
    tiles = max(1, -(-total // (wanted * tuning.block)))
    programs = max(1, -(-total // (tiles * tuning.block)))
    return ShareConfig(tuning.block, tuning.num_warps, tiles, programs, power_of_two_from(device.multiprocessors))


@dataclass(frozen=True)
class PackConfig:
    """Tokens that a program moves, elements of each, and warps."""

    tokens: int
    width: int
    num_warps: int


def choose_pack(width: int) -> PackConfig:
    """2048 elements a program: of one token if it is that wide, else of as many as fit."""
    wide = min(power_of_two_from(width), 2048)
    return PackConfig(2048 // wide, wide, 4)
