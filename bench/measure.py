"""What every benchmark shares: where it runs, its rounds, and how much memory a call takes beyond its inputs."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from prime_kernels._bench.timing import peak_bytes

DEVICE = os.environ.get("PRIME_BENCH_DEVICE", "cpu")
# The smallest sizes, to see that a benchmark still works.
SMALL = bool(os.environ.get("PRIME_BENCH_SMALL"))
ROUNDS = 2 if SMALL else 9
# The compiler makes code for real sizes alone; at the smallest it only traces.
COMPILER = "aot_eager" if SMALL else "inductor"


def timed(
    benchmark,
    call: Callable[..., object],
    traffic: int = 0,
    flops: int = 0,
    rounds: int = ROUNDS,
    before: Callable[[], object] | None = None,
) -> None:
    """Time ``call`` (median of some rounds after one to warm up) and record rates and peak memory.

    Args:
        benchmark: the fixture of pytest-benchmark.
        call: what to time.
        traffic: bytes that must move at least once.
        flops: floating-point operations that are needed at least.
        rounds: how often.
        before: makes the argument of each call, untimed.
    """

    def once(*arguments: object) -> None:
        call(*arguments)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    def argument() -> tuple[tuple[object, ...], dict[str, object]]:
        made = () if before is None else (before(),)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return made, {}

    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    once(*argument()[0])
    # With a function that makes arguments, each round is one call, the warm-up too.
    benchmark.pedantic(once, setup=argument, rounds=rounds, warmup_rounds=1)
    ready = argument()[0]
    peak = peak_bytes(lambda: once(*ready), torch.device(DEVICE))
    benchmark.extra_info["peak MiB"] = "" if peak is None else round(peak / 2**20, 1)
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        if traffic:
            benchmark.extra_info["GB/s"] = float(f"{traffic / median / 1e9:.3g}")
        if flops:
            benchmark.extra_info["TFLOP/s"] = float(f"{flops / median / 1e12:.3g}")


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Random numbers that want a gradient."""
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def forward_backward(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> Callable[[], None]:
    """A call that runs, takes the gradient of the weighted sum of the results, and drops it again."""
    weights: list[torch.Tensor] = []

    def once() -> None:
        result = run()
        if not weights:
            weights.append(torch.randn_like(result))
        result.backward(weights[0])
        for one in leaves:
            one.grad = None

    return once


def backward_alone(
    run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]
) -> tuple[Callable[[torch.Tensor], None], Callable[[], torch.Tensor]]:
    """(a call that takes the gradient of a result and drops it, what makes the result), for ``timed``."""

    def once(result: torch.Tensor) -> None:
        torch.autograd.grad(result, leaves, torch.ones_like(result))

    return once, run


def compiled(function: Callable) -> Callable:
    """torch.compile of ``function``."""
    return torch.compile(function, backend=COMPILER)


def without_gradients(run: Callable[[], object]) -> Callable[[], None]:
    """A call that runs without recording a graph."""

    def once() -> None:
        with torch.no_grad():
            run()

    return once
