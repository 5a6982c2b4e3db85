"""How kernels over shares of the tokens are launched: their counters, and phases with a barrier between them."""

import math
from typing import Any

import torch
from torch import Tensor

from prime_kernels._rows import column
from prime_kernels._triton import interpreted
from prime_kernels._triton._config import ShareConfig, choose_shares
from prime_kernels._triton.log_probs import device_of

# Offsets are counted in int32 within kernels, with room for a step of a loop.
MAX_SEGMENTS = 2**30

# A counter for each (device, stream): launches on one stream follow each other, and each leaves it 0.
_counters: dict[tuple[torch.device, int], Tensor] = {}


def shares(total: int, device: torch.device) -> ShareConfig:
    return choose_shares(total, device_of(device))


def counter(device: torch.device) -> Tensor:
    """An int32 that is 0 when the next kernel on the current stream of ``device`` starts. That kernel leaves it 0.

    Within the capture of a CUDA graph it is a new one: its zero becomes part of the graph, which may run beside others.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]


def options(config: ShareConfig) -> dict[str, int]:
    """What every launch over shares has besides its arguments."""
    return {
        "BLOCK": config.block,
        "SLOTS": config.slots,
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
    }


def launch_phases(kernel: Any, config: ShareConfig, arguments: tuple, first: int, last: int, **constants: Any) -> None:
    """Phases ``first`` to ``last`` of a kernel whose programs wait for each other between them: one launch.

    The interpreter runs programs one after another, where waiting would never end: there each phase is a launch.
    """
    grid, constants = (config.programs,), options(config) | constants
    if interpreted():
        for phase in range(first, last + 1):
            kernel[grid](*arguments, FIRST=phase, LAST=phase, **constants)
    else:
        kernel[grid](*arguments, FIRST=first, LAST=last, launch_cooperative_grid=last > first, **constants)


def offsets(cu: Tensor, device: torch.device) -> tuple[Tensor, int]:
    """Checked offsets [S + 1] int64, and S."""
    segments = cu.numel() - 1
    assert segments < MAX_SEGMENTS
    return column(cu, torch.int64, segments + 1, device), segments


def log2(gamma: float) -> float:
    return math.log2(gamma) if gamma > 0.0 else -math.inf
