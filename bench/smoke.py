"""Every operation on every GPU backend: against eager, captured in a CUDA graph, and on a second stream.

usage: python bench/smoke.py

One line an operation, with the error's own words where it fails; the exit status is 1 if any does. The first thing that
bench/gpu.sh runs: a minute, before anything is timed. Without a GPU it runs what the CPU backends can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch

import prime_kernels as pk
from prime_kernels import _selftest

# Operations whose documentation says that they read sizes back from the device, which a graph cannot hold.
WAITS = ("linear_log_probs", "linear_ppo_loss", "linear_nll", "prm_loss")


def captured(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The results of a replay of ``call``, whose capture allocates them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()  # compiles and loads before the capture, which allows neither
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for result in results:
        result.zero_()
    graph.replay()
    torch.cuda.synchronize()
    return results


def on_second_stream(call: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """The results of ``call`` on a stream of its own, while the default one is kept busy."""
    busy = torch.randn(2048, 2048, device="cuda")
    stream = torch.cuda.Stream()
    for _ in range(20):
        busy = busy @ busy.T / 2048
    stream.wait_stream(torch.cuda.default_stream())
    with torch.cuda.stream(stream):
        results = call()
    stream.synchronize()
    return results


def fused(columns: int) -> str | None:
    """What is wrong with the product that takes the softmax in its epilogue, if anything.

    Several tiles each way with an end of the vocabulary; both against eager, and kept logits against those made again.
    """
    from prime_kernels import _tuning

    hidden, weight = (torch.randn(n, 256, device="cuda").bfloat16().requires_grad_() for n in (700, 50264))
    ids = torch.randint(50264, (700,), device="cuda")

    def results(backend: str, **tiles: int) -> list[torch.Tensor]:
        with _tuning.trial(_tuning.none("cuda")._replace(tiles=tiles)):
            logp, entropy = pk.linear_log_probs(hidden, weight, ids, with_entropy=True, backend=backend)
            return [logp, entropy, *torch.autograd.grad(logp.sum() + entropy.sum(), [hidden, weight])]

    try:
        want = results("eager")
        kept, again = results("triton", fused_columns=columns), results("triton", fused_columns=columns, kept_bytes=1)
        for one, other, exact in zip(kept, again, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            torch.testing.assert_close(one, exact, rtol=0, atol=0.02 * exact.abs().max().item())
        torch.testing.assert_close(kept[0], want[0], rtol=1e-5, atol=1e-4)
    except Exception as error:  # a failed launch may raise anything; its words are what there is to know
        return f"{type(error).__name__}: {error}"
    return None


def checks() -> Iterator[tuple[str, str | None]]:
    """(what, None or the failure) of every check that can run here."""
    for outcome in _selftest.run():
        yield f"{outcome.op} on {outcome.backend}", outcome.failure
    if not torch.cuda.is_available():
        return
    cases = _selftest._cases(torch.Generator().manual_seed(0), "cuda")
    backends = [name for name in ("triton", "cuda") if pk.available_backends()[name] is None]
    for name, way in (("in a CUDA graph", captured), ("on a second stream", on_second_stream)):
        for backend in backends:
            for op, (call, leaves) in cases.items():
                if way is captured and op in WAITS:
                    continue
                yield f"{op} on {backend} {name}", same(way, call, backend, leaves)
    # Last, as no default depends on it and an illegal address would fail whatever comes after it.
    if torch.cuda.get_device_capability() >= (9, 0) and "triton" in backends:
        for columns in (256, 128):
            yield f"softmax in the product's epilogue, {columns} columns", fused(columns)


def same(way: Callable, call: Callable, backend: str, leaves: list[torch.Tensor]) -> str | None:
    """What is wrong with ``way`` of a call, if anything; results are compared with those of a plain call."""
    try:
        with torch.no_grad():
            want = call(backend, *leaves)
            got = way(lambda: call(backend, *leaves))
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    except Exception as error:  # a failed launch may raise anything; its words are what there is to know
        return f"{type(error).__name__}: {error}"
    return None


def main() -> int:
    failed = 0
    for what, failure in checks():
        failed += failure is not None
        print(f"{what}: {'ok' if failure is None else f'FAILED: {failure}'}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
