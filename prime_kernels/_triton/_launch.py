"""Launches of kernels over packed tokens: configuration, phases with barriers between them, device of the launch."""

import contextlib
import functools
import math
from typing import Any

import torch
from torch import Tensor

from prime_kernels._layout import column
from prime_kernels._triton import interpreted
from prime_kernels._triton._launch_config import SCAN_TUNING, Device, ScanConfig, ScanTuning, choose_scan

# Kernels index offsets in int32, with room for one loop step beyond the last.
MAX_SEGMENTS = 2**30


def scan_config(total: int, device: torch.device, tuning: ScanTuning = SCAN_TUNING) -> ScanConfig:
    return choose_scan(total, device_of(device), tuning)


def options(config: ScanConfig) -> dict[str, int]:
    """Compile-time options of every launch over packed tokens."""
    return {
        "BLOCK": config.block,
        "SLOTS": config.slots,
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
    }


def launch_phases(
    kernel: Any, config: ScanConfig, arguments: tuple[Any, ...], first: int, last: int, **constants: Any
) -> None:
    """Phases ``first`` to ``last`` of a kernel with grid-wide barriers between them, in one launch.

    The interpreter runs programs one after another and would never pass a barrier: there each phase is a launch.
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


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_of(device: torch.device) -> Device:
    return Device() if device.type != "cuda" or interpreted() else _cuda_device(device)


@functools.cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))
