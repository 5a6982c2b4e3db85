"""Launch configurations: pure functions of sizes and device."""

from dataclasses import dataclass

# Resident programs per multiprocessor: with fewer, memory bandwidth is not saturated.
PROGRAMS_PER_MULTIPROCESSOR = 4
MAX_SPLITS = 64
MIN_BLOCK = 128


@dataclass(frozen=True)
class Device:
    """Properties that the choice depends on; the defaults are for the interpreter, which runs one program at a time."""

    multiprocessors: int = 1
    capability: tuple[int, int] = (9, 0)


@dataclass(frozen=True)
class Tuning:
    """The parameters that bench/tune.py searches."""

    block_bytes: int
    """Bytes of a row that a program processes per iteration."""
    bytes_per_thread: int
    """Of these, bytes per thread."""
    num_stages: int
    """Pipeline stages of the loop."""


# The first entry applies whose compute capability the device has at least. Estimated, not yet measured: four 16-byte
# loads in flight per thread, and larger blocks for more bandwidth.
TUNED = {
    (9, 0): Tuning(16384, 64, 1),
    (0, 0): Tuning(8192, 64, 1),
}


@dataclass(frozen=True)
class Config:
    """Launch configuration of the row kernels."""

    block: int
    """Columns per iteration."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Pipeline stages of the loop."""
    splits: int
    """Programs per row."""


def choose(rows: int, vocabulary: int, itemsize: int, device: Device, tuning: Tuning | None = None) -> Config:
    """The configuration for ``rows`` rows (of all models together) of ``vocabulary`` elements of ``itemsize`` bytes.

    Rows are split only if there are too few to fill the device, and into at most as many parts as they have blocks.
    """
    tuning = tuning or next(found for capability, found in TUNED.items() if device.capability >= capability)
    block = max(MIN_BLOCK, min(power_of_two_from(vocabulary), tuning.block_bytes // itemsize))
    num_warps = max(1, block * itemsize // (32 * tuning.bytes_per_thread))
    wanted = device.multiprocessors * PROGRAMS_PER_MULTIPROCESSOR // max(1, rows)
    blocks = -(-vocabulary // block)
    splits = power_of_two_to(max(1, min(wanted, blocks, MAX_SPLITS)))
    return Config(block, num_warps, tuning.num_stages, splits)


@dataclass(frozen=True)
class HeadConfig:
    """Launch configuration of the product of a head with the softmax in its epilogue."""

    block_rows: int
    """Tokens of a tile."""
    block_columns: int
    """Its part of the vocabulary."""
    block_width: int
    """Hidden dimensions per step of the product."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Steps in shared memory."""
    group: int
    """Row blocks that go over the vocabulary together."""
    programs: int
    """Resident on a multiprocessor."""


# By columns, for Hopper: one program, whose accumulators are half of all registers, or two, with the epilogue of one
# beside the product of the other, that read a third more from the L2 cache. bench/tune.py searches more.
HEAD_CONFIGS = {256: HeadConfig(128, 256, 64, 8, 4, 16, 1), 128: HeadConfig(128, 128, 64, 4, 3, 16, 2)}


def power_of_two_from(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << (value - 1).bit_length()


def power_of_two_to(value: int) -> int:
    """The largest power of two that is at most ``value``."""
    return 1 << (value.bit_length() - 1)


@dataclass(frozen=True)
class ScanTuning:
    """Parameters of kernels over packed tokens."""

    block: int
    """Tokens per tile."""
    num_warps: int
    """Warps per program."""
    tokens_per_program: int
    """The fewest tokens for which another program is started."""
    per_multiprocessor: int = 1
    """Programs that are resident together on a multiprocessor: while one waits, for memory or for the rest of its
    tile's scan, the others run."""


# Estimated, not yet measured: four or eight tokens per thread give 16-byte loads, and their doubles fit into registers;
# with fewer than two tiles a program would mostly wait for the others.
SCAN_TUNING = ScanTuning(block=1024, num_warps=4, tokens_per_program=2048, per_multiprocessor=2)
# The losses of prefixes take more registers a token, and spill with twice as many tokens.
PREFIX_TUNING = ScanTuning(block=512, num_warps=4, tokens_per_program=2048, per_multiprocessor=2)


@dataclass(frozen=True)
class ScanConfig:
    """Launch configuration of kernels over packed tokens."""

    block: int
    """Tokens per tile."""
    num_warps: int
    """Warps per program."""
    tiles: int
    """Tiles per program."""
    programs: int
    """Programs in all."""
    slots: int
    """Size of the arrays that programs publish into: a power of two, at least their number."""
    per_multiprocessor: int = 1
    """Programs that must fit on a multiprocessor together."""

    @property
    def registers(self) -> int:
        """Registers per thread, at most, with which as many programs fit on a multiprocessor."""
        return min(255, 65536 // (32 * self.num_warps * self.per_multiprocessor))


def choose_scan(total: int, device: Device, tuning: ScanTuning = SCAN_TUNING) -> ScanConfig:
    """Equal ranges of ``total`` tokens in whole tiles, independent of segments.

    All programs are then resident at once, as barriers between them require. Only the numbers of tiles and programs
    depend on ``total``, and kernels are not recompiled for them.
    """
    most = device.multiprocessors * tuning.per_multiprocessor
    wanted = max(1, min(-(-total // tuning.tokens_per_program), most))
    tiles = max(1, -(-total // (wanted * tuning.block)))
    programs = max(1, -(-total // (tiles * tuning.block)))
    slots = power_of_two_from(most)
    return ScanConfig(tuning.block, tuning.num_warps, tiles, programs, slots, tuning.per_multiprocessor)


@dataclass(frozen=True)
class PackConfig:
    """Launch configuration of pack and unpack."""

    tokens: int
    """Tokens per program."""
    width: int
    """Elements of a token per program."""
    num_warps: int
    """Warps per program."""


def choose_pack(width: int) -> PackConfig:
    """2048 elements per program: of one token if it has as many, else of several tokens."""
    elements = min(power_of_two_from(width), 2048)
    return PackConfig(2048 // elements, elements, 4)
