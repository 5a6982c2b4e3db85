"""Tiles over the whole vocabulary on GPUs: as large as the memory suggests, and summed by the product itself.

The gradient of a head [V, D] is a sum over tiles of tokens. In float32 each further tile reads and writes 8 V D bytes:
at 8,192 tokens, D = 4,096 and V = 131,072 sums of 32 tiles of 128 MiB take longer than the three products that they
belong to. One tile, of 4 GiB in float32, needs no sum.
"""

import functools

import torch
from torch import Tensor

from prime_kernels.ops._tile_shapes import spans

# A tile's share of all memory: 4.75 GiB of a GPU of 80 GB, which has 79 GiB, and 1.5 of 24. The float32 logits of 8,192
# tokens and 152,064 columns are one tile then, for 3 GiB more than in three tiles: by bench/gpu_targets.py that saves
# 5 to 11 % of the time. It depends on the device alone, so that results do not change with what else is in memory,
# until there is too little left.
SHARE = 16
# Leading binary digits of a size that are kept: GPUs of one kind differ by a little in the memory they report.
DIGITS = 5
# Where sizes are asked for without a GPU, as in a plan of a run elsewhere.
ASSUMED_MEMORY = 79 * 2**30

# Rows of a 16-bit product that is added to a float32 sum, by device: enough for full speed, small next to the sum.
ADDED_ROWS = {"cpu": 2**12, "cuda": 2**14}


def size_on_gpu(least: int) -> int:
    """Bytes of a tile of logits on the current GPU, or without one on one of 80 GB; at least ``least``."""
    total = _total(torch.cuda.current_device()) if torch.cuda.is_available() else ASSUMED_MEMORY
    return of_memory(total, least)


def of_memory(total: int, least: int) -> int:
    """Bytes of a tile of logits on a GPU with ``total`` bytes; at least ``least``."""
    share = total // SHARE
    rest = max(0, share.bit_length() - DIGITS)
    return max(least, share >> rest << rest)


def fitting(size: int, needed: int, device: torch.device, least: int) -> int:
    """``size``, ``needed`` bytes of it used, halved until it is at most a third of the free memory, or ``least``.

    With the gradient in 16 bits beside float32 logits that makes a half. Memory that torch's allocator holds and does
    not use is free.
    """
    if device.type != "cuda" or min(size, needed) <= least:
        return size
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + held
    return halved(size, needed, free, least)


def halved(size: int, needed: int, free: int, least: int) -> int:
    """The arithmetic of :func:`fitting`."""
    while size > least and min(size, needed) > free // 3:
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


def kind_of(tensor: Tensor) -> str:
    return "cpu" if tensor.device.type == "cpu" else "cuda"


class Sum:
    """A sum of products: written directly if there is one term, else accumulated in float32.

    A 16-bit sum would lose small terms. A single term is written to a tensor like ``like``, or with ``into`` to it.
    """

    def __init__(self, like: Tensor, *, once: bool, into: bool = False) -> None:
        self.once = once
        if once:
            self.total = like if into else torch.empty_like(like)
        else:
            self.total = torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def add(self, a: Tensor, b: Tensor, rows: slice = slice(None)) -> None:
        """Add ``a @ b`` to these rows."""
        at = self.total[rows]
        if self.once:
            torch.mm(a, b, out=at)
        elif a.dtype == torch.float32:
            at.addmm_(a, b)
        elif sums_in_product(kind_of(a)):
            add_product(at, a, b)
        else:
            for block in spans(len(a), ADDED_ROWS[kind_of(a)]):
                at[block].add_(a[block] @ b)
