"""The Triton backend: whether it can run. Other modules of this folder import triton; this one does so lazily."""

import functools

import torch

INSTALL = "pip install 'prime-process-rewards[triton]'"


def unavailable_reason() -> str | None:
    """None if the kernels can run, otherwise why not and what to do about it."""
    error = _import_error()
    if error is not None:
        return f"triton cannot be imported ({error}); install it with: {INSTALL}"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA device (TRITON_INTERPRET=1, set before Python starts, runs the kernels without one)"
    return None


def interpreted() -> bool:
    """True if Triton runs kernels in its Python interpreter (TRITON_INTERPRET=1), slowly and on CPU tensors too."""
    if _import_error() is not None:
        return False
    from triton import knobs

    return knobs.runtime.interpret


@functools.cache
def _import_error() -> str | None:
    try:
        import triton.language  # noqa: F401
    except ImportError as error:
        return str(error)
    return None
