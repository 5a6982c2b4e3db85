"""``python -m prime_kernels``: versions, build, available backends with reasons for the others, and a self-test.

The exit status is 1 if an operation disagrees with its reference on a backend that says it can run, if another
distribution has replaced the package, or if PRIME_KERNELS_TUNING names a file that is refused.
``python -m prime_kernels bench`` measures every operation instead; ``bench --help`` lists its options.
"""

import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import prime_kernels
from prime_kernels import _distribution


def main(words: Sequence[str]) -> int:
    """Print the report, or run the named command; the exit status."""
    if words and words[0] == "bench":
        from prime_kernels._bench import command

        return command.main(words[1:])
    if words:
        print(f"usage: python -m prime_kernels [bench ..]: unknown command {words[0]!r}", file=sys.stderr)
        return 2
    from prime_kernels import _tuning

    conflict = _distribution.conflict()
    folder = Path(_distribution.__file__).parent
    if not hasattr(prime_kernels, "available_backends"):
        print(f"prime_kernels in {folder} is not that of {_distribution.NAME}: {conflict}", file=sys.stderr)
        return 1
    print(f"prime_kernels {prime_kernels.__version__} in {folder}")
    if conflict is not None:
        print(f"conflict: {conflict}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}")
    print(f"build: {build()}")
    print("devices:", ", ".join(devices()))
    print("backends:")
    for name, reason in prime_kernels.available_backends().items():
        print(f"  {name:7} {'available' if reason is None else f'not available: {reason}'}")
    usable, tuning = _tuning.said()
    print(f"tuning: {tuning}")
    # Of the kernels alone: a file that is refused says so above.
    with _tuning.trial(_tuning.none()):
        return max(self_test(), int(not usable))


def build() -> str:
    """How the extension was built, in one line."""
    from prime_kernels import _native

    reason = _native.unavailable_reason()
    if reason is not None:
        return reason
    info = _native.build_info()
    threads = "OpenMP" if info["openmp"] else "one thread"
    cuda = "CUDA kernels: " if info["cuda"] else "no CUDA kernels: "
    return f"{info['compiler']}, CPU kernels of {info['cpu']} in use, {threads}; {cuda}{info['cuda_detail']}"


def devices() -> list[str]:
    """The processor and every CUDA device that torch sees."""
    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for place in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(place)
        found.append(f"cuda:{place} ({torch.cuda.get_device_name(place)}, sm_{major}{minor})")
    return found


def self_test() -> int:
    """Print one line for each operation and backend; 1 if any fails."""
    from prime_kernels import _selftest

    print("self-test: largest error of results and gradients against plain PyTorch")
    start, outcomes = time.perf_counter(), []
    for outcome in _selftest.run():
        outcomes.append(outcome)
        said = f"ok, {outcome.error:.1e}" if outcome.passed else f"FAILED: {outcome.failure}"
        print(f"  {outcome.op:21} {outcome.backend:7} {said}", flush=True)
    failed = sum(not each.passed for each in outcomes)
    seconds = time.perf_counter() - start
    if not outcomes:
        print("  nothing but eager can run here")
    print(f"{len(outcomes) - failed} of {len(outcomes)} passed in {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # of a reader such as head that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
