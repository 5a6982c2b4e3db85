"""Tiles over the whole vocabulary on GPUs: as large as the memory suggests, and summed by the product itself.

The gradient of a head [V, D] is a sum over tiles of tokens. In float32 each further tile reads and writes 8 V D bytes:
at 8,192 tokens, D = 4,096 and V = 131,072 sixteen tiles of 128 MiB take as long as the three products that they belong
to. One tile of 2 GiB needs no sum.
"""

import functools

import torch
from torch import Tensor

# A tile's share of all memory: 2 GiB of 80, 512 MiB of 24. It depends on the device alone, so that results do not
# change with what else is in memory, until there is too little left.
SHARE = 32
# Where sizes are asked for without a GPU, as in a plan of a run elsewhere.
ASSUMED_MEMORY = 80 * 2**30


def size_on_gpu(least: int) -> int:
    """Bytes of a tile on the current GPU, or without one on one of 80 GiB: a power of two, at least ``least``."""
    total = _total(torch.cuda.current_device()) if torch.cuda.is_available() else ASSUMED_MEMORY
    return of_memory(total, least)


def of_memory(total: int, least: int) -> int:
    """Bytes of a tile on a GPU with ``total`` bytes: a power of two, at least ``least``."""
    return max(least, 1 << ((total // SHARE).bit_length() - 1))


def fitting(size: int, needed: int, device: torch.device, least: int) -> int:
    """``size``, of which ``needed`` bytes are used, halved until it fits into half of the free memory or is ``least``.

    Memory that torch's allocator holds and does not use is free.
    """
    if device.type != "cuda" or min(size, needed) <= least:
        return size
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    return halved(size, needed, free, least)


def halved(size: int, needed: int, free: int, least: int) -> int:
    """The arithmetic of :func:`fitting`."""
    while size > least and min(size, needed) > free // 2:
        size //= 2
    return max(size, least)


def sums_in_product(device_type: str) -> bool:
    """Whether a product of 16-bit tensors can be added to a float32 tensor without being rounded or stored between."""
    return device_type != "cpu" and "dtype_out" in torch.ops.aten.addmm.overloads()


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b`` with a float32 ``total`` and 16-bit factors, in one product."""
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@functools.cache
def _total(device: int) -> int:
    return torch.cuda.get_device_properties(device).total_memory
