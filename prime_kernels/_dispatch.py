"""Which backend runs an operation.

Selection: the ``backend`` argument, then :func:`use_backend`, then the environment variable ``PRIME_KERNELS_BACKEND``,
then the file that ``PRIME_KERNELS_TUNING`` names, then the fastest backend for the device of the tensors.

* The argument is strict: a backend that is unavailable or cannot take the tensors is an error; nothing falls back.
* ``use_backend`` and the environment variable apply to many operations. The backend must be available, but an operation
  whose tensors it cannot take (other device, float64) runs on the fastest of the others.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from prime_kernels import _tuning

BACKENDS = ("eager", "cpu", "triton", "cuda")
ENVIRONMENT_VARIABLE = "PRIME_KERNELS_BACKEND"

# Every operation; each runs on every backend.
OPERATIONS = frozenset(
    {
        "candidates",
        "distribution_ppo_loss",
        "linear_log_probs",
        "linear_log_ratios",
        "linear_nll",
        "linear_ppo_loss",
        "log_probs",
        "log_ratios",
        "pack",
        "ppo_loss",
        "prm_loss",
        "rloo_advantages",
        "segment_scan",
        "segment_sum",
        "step_rewards",
        "unpack",
    }
)

# These copy elements without reading them, so they take any dtype.
_COPIES = ("pack", "unpack")

# Fastest first; eager comes after all of these.
_FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}

_chosen: ContextVar[str | None] = ContextVar("prime_kernels_backend", default=None)
_warned_of_missing_extension = False


class BackendUnavailable(RuntimeError):
    """The backend that was asked for cannot run; the message says why and what to do."""


def available_backends() -> dict[str, str | None]:
    """Every backend name, with None if it can run here and otherwise the reason why it cannot."""
    return {name: _unavailable_reason(name) for name in BACKENDS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Prefer a backend for every operation called inside the ``with`` block (this thread or task only).

    Operations whose tensors it cannot take run on the fastest of the others; an explicit ``backend=`` argument takes
    precedence.

    Args:
        name: "eager", "cpu", "triton" or "cuda".

    Raises:
        ValueError: unknown name.
        BackendUnavailable: the backend cannot run here.
    """
    _require_available("name", name)
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def resolve(op: str, tensor: torch.Tensor, backend: str | None) -> str:
    """The backend that runs ``op`` on ``tensor``, by the rules above.

    While torch.compile traces it is always "eager": operations without a custom op stay plain PyTorch, so the compiler
    can fuse them.
    """
    if torch.compiler.is_compiling():
        return "eager"
    if backend is not None:
        _require_available("backend", backend)
        return _strict(op, tensor, backend)
    preferred, source = _chosen.get(), "use_backend"
    if preferred is None:
        preferred, source = os.environ.get(ENVIRONMENT_VARIABLE) or None, ENVIRONMENT_VARIABLE
    if preferred is not None:
        _require_available(source, preferred)
        if _can_run(op, tensor, preferred):
            return preferred
    else:
        tuned = _tuning.backend(op, tensor.device.type)
        if tuned is not None:
            _require_available(_tuning.ENVIRONMENT_VARIABLE, tuned)
            if _can_run(op, tensor, tuned):
                return tuned
    for name in _FASTEST.get(tensor.device.type, ()):
        if not _can_run(op, tensor, name):
            continue
        reason = _unavailable_reason(name)
        if reason is None:
            return name
        if name == "cpu":
            _warn_of_missing_extension(reason)
    return "eager"


def _strict(op: str, tensor: torch.Tensor, backend: str) -> str:
    if backend == "eager":
        return backend
    expected = _device_types(backend)
    if tensor.device.type not in expected:
        raise ValueError(f"backend: expected {' or '.join(expected)} tensors for {backend!r}, got {tensor.device}")
    if not _takes_dtype(op, tensor):
        raise TypeError(f"backend: expected float32, bfloat16 or float16 tensors for {backend!r}, got torch.float64")
    return backend


def _can_run(op: str, tensor: torch.Tensor, backend: str) -> bool:
    return backend == "eager" or (_takes_dtype(op, tensor) and tensor.device.type in _device_types(backend))


def _takes_dtype(op: str, tensor: torch.Tensor) -> bool:
    return tensor.dtype != torch.float64 or op in _COPIES


def _device_types(backend: str) -> tuple[str, ...]:
    if backend == "triton":
        from prime_kernels import _triton

        return ("cuda", "cpu") if _triton.interpreted() else ("cuda",)
    return ("cpu",) if backend == "cpu" else ("cuda",)


def _require_available(argument: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    reason = _unavailable_reason(name)
    if reason is not None:
        raise BackendUnavailable(f"{argument}: backend {name!r} is not available: {reason}")


def _unavailable_reason(name: str) -> str | None:
    if name == "eager":
        return None
    if name == "triton":
        from prime_kernels import _triton

        return _triton.unavailable_reason()
    from prime_kernels import _native

    return _native.unavailable_reason() if name == "cpu" else _native.cuda_unavailable_reason()


def _warn_of_missing_extension(reason: str) -> None:
    global _warned_of_missing_extension
    if not _warned_of_missing_extension:
        _warned_of_missing_extension = True
        warnings.warn(f"prime_kernels runs CPU tensors on 'eager': {reason}", RuntimeWarning, stacklevel=4)
