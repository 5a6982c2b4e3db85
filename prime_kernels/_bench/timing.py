"""Seconds and memory of a call, and what the device can do at best."""

import ctypes
import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# A round on a GPU lasts at least this long, by repeating what is shorter, so that a synchronisation does not count. On
# a CPU each call is a round: where others use it too, every long round would have to wait for them.
SHORTEST_ROUND = 2e-3
MOST_REPEATS, MOST_ROUNDS = 100, 9


class Ceiling(NamedTuple):
    """Measured rates of the device."""

    copy: float
    """Bytes a second that a copy reads and writes."""
    product: float
    """Floating-point operations a second of a square matrix product in ``dtype``."""
    dtype: torch.dtype
    """Of logits, hidden states and heads in this run."""


class Timing(NamedTuple):
    """Median of ``rounds`` rounds, in seconds a call."""

    median: float
    rounds: int


def synchronize(device: torch.device) -> None:
    """Wait for what was launched."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(
    call: Callable[..., object], device: torch.device, seconds: float, before: Callable[[], object] | None = None
) -> Timing:
    """The median of as many rounds of ``call`` as fit into ``seconds``, at least one, after two that do not count.

    ``before`` makes the argument of each call, untimed.
    """

    def once(repeats: int) -> float:
        arguments = [] if before is None else [before()]
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call(*arguments)
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    deadline = time.perf_counter() + seconds
    first = min(once(1), once(1))
    calls = 1 if before is not None else max(1, min(MOST_REPEATS, math.ceil(SHORTEST_ROUND / max(first, 1e-7))))
    repeats, most = (1, calls * MOST_ROUNDS) if device.type == "cpu" else (calls, MOST_ROUNDS)
    rounds = [once(repeats)]
    while len(rounds) < most and time.perf_counter() + rounds[-1] * repeats < deadline:
        rounds.append(once(repeats))
    return Timing(statistics.median(rounds), len(rounds))


def ceiling(device: torch.device, elements: int, side: int, seconds: float) -> Ceiling:
    """Rates of a copy of ``elements`` 16-bit numbers and of a product of ``side`` x ``side`` matrices.

    On CPUs products are made in the faster of bfloat16 and float32: many have no instruction for bfloat16.
    """
    copy = _copy_rate(device, elements, seconds / 3)
    rates: dict[torch.dtype, float] = {}
    for dtype in (torch.bfloat16,) if device.type == "cuda" else (torch.bfloat16, torch.float32):
        left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(left)

        def product(left: Tensor = left, right: Tensor = right, out: Tensor = out) -> None:
            torch.mm(left, right, out=out)

        rates[dtype] = 2 * side**3 / timed(product, device, seconds / 3).median
    dtype = max(rates, key=lambda each: rates[each])
    return Ceiling(copy, rates[dtype], dtype)


def _copy_rate(device: torch.device, elements: int, seconds: float) -> float:
    source = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), device, seconds).median


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that ``call`` holds at once beyond what was there before it; None where it cannot be read."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not Path("/proc/self/clear_refs").exists():
        call()
        return None
    # What earlier calls freed would otherwise be taken again unseen.
    ctypes.CDLL(None).malloc_trim(0)
    from prime_kernels import _native

    _native.release_spare_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from what is held now
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def peak_of_tensors(call: Callable[[], object]) -> int:
    """The most bytes at once of what ``call`` allocates on the CPU, as PyTorch's allocator records every one of them.

    Exact and the same in every run, other than :func:`peak_bytes`; memory from elsewhere is not in it.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held, default=0)


def free_bytes(device: torch.device) -> int:
    """Memory that calls can take on the device; where the system does not say, a gigabyte."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 2**30)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
