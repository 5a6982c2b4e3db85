"""Counts where code waits for a device: on a GPU as CUDA reports it, else by what would wait there.

On a CPU two modes watch every call: a Python method that reads a tensor's values (`item`, `tolist`, `bool`), and an
operation whose result has a shape that only values know (`nonzero`, an index by a mask, `repeat_interleave` without
its size). Each is counted by the function of this project, or of transformers, that asked for it.
"""

import contextlib
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READING = {
    "item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "is_nonzero", "equal",
    "allclose", "__contains__",
}  # fmt: skip
SHAPED = {"nonzero", "masked_select", "unique_consecutive", "_unique2", "unique_dim", "_local_scalar_dense", "equal"}
PACKAGES = ("prime_trainer", "prime_kernels", "transformers")
# Code of prime_kernels that reads values of CPU tensors, where nothing waits, and not of CUDA tensors: the checks
# (asserted on a GPU), the C++ backend's arguments and results, the longest segment, pairs (a kernel's).
OF_CPUS = {
    "prime_kernels/_checks.py": None,
    "prime_kernels/_native/packed.py": None,
    "prime_kernels/ops/segment_scan.py": None,
    "prime_kernels/ops/rloo_advantages.py": {"fused"},
    "prime_kernels/_segment_math.py": {"ordered_pairs"},
}
# Layout and shuffles on the host; that they come before the first pass is for the test to say.
OF_HOST = {
    *(("prime_trainer/train/batch.py", name) for name in ("__init__", "lay_out", "ends", "minibatches")),
    ("prime_trainer/run/seeds.py", "shuffled"),
}


def _place() -> str | None:
    """file:function of the innermost frame of PACKAGES, None where it is of OF_CPUS or below one of OF_HOST."""
    frame, found = sys._getframe(1), None
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        start = next((k for k, part in enumerate(parts) if part in PACKAGES), None)
        if start is not None and "site-packages" not in parts[start:]:
            file, name = "/".join(parts[start:]), frame.f_code.co_name
            if (file, name) in OF_HOST:
                return None
            if found is None:
                known = OF_CPUS.get(file, ())
                if known is None or name in known:
                    return None
                found = f"{file}:{name}"
        frame = frame.f_back
    return found or "elsewhere"


class _Methods(TorchFunctionMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READING and args and isinstance(args[0], torch.Tensor):
            place = _place()
            if place is not None:
                self.counts[place] += 1
            with torch._C.DisableTorchFunction():
                return self.counts.alone(func, args, kwargs)
        return func(*args, **(kwargs or {}))


class _Operations(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.counts.inside and self._waits(func, args, kwargs):
            place = _place()
            if place is not None:
                self.counts[place] += 1
        return func(*args, **kwargs)

    @staticmethod
    def _waits(func, args, kwargs) -> bool:
        name = func.overloadpacket.__name__
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None and "output_size" in {a.name for a in func._schema.arguments}
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return name in SHAPED


class Waits(Counter):
    """Waits by place."""

    inside = False
    """Whether a method that was counted is running its operations."""

    def alone(self, func, args, kwargs):
        self.inside = True
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.inside = False


@contextlib.contextmanager
def on_host():
    """While it lasts, every wait that a GPU would have had is counted."""
    counts = Waits()
    with _Methods(counts), _Operations(counts):
        yield counts


@contextlib.contextmanager
def on_gpu():
    """The same by CUDA's own report; the place is a line."""
    counts = Waits()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield counts
        finally:
            torch.cuda.set_sync_debug_mode("default")
            counts.update(f"{each.filename}:{each.lineno}" for each in said if "synchroniz" in str(each.message))
