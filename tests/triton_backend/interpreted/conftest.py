"""Repairs of Triton's interpreter that these tests need, and small shares of the tokens."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter

from prime_kernels._triton._launch_config import Device, ScanConfig, ScanTuning, choose_scan

_patch_lang, _patched = interpreter._patch_lang, set()


def _patch_once(function):
    """Each launch, and each call of one kernel function by another, tl.sum among them, would look through all of
    triton.language anew, which takes longer than the kernels (Triton 3.6). Nothing compiles in this process."""
    modules = frozenset(id(value) for value in function.__globals__.values() if value is tl or value is tl.core)
    if modules not in _patched:
        _patched.add(modules)
        _patch_lang(function)
    return interpreter._LangPatchScope()


interpreter._patch_lang = _patch_once
# Each sum and product of integers would be made again as int64 for an assertion that is dropped without debug=True.
builder = interpreter.interpreter_builder
builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

_scalar_np_dtype = functools.cache(interpreter._get_np_dtype)


def _np_dtype(kind):
    """Asked for with every instruction, and looked up in a table that is made anew each time."""
    scalar = kind.scalar
    return np.dtype(np.uint64) if scalar.is_ptr() else _scalar_np_dtype(scalar)


interpreter._get_np_dtype = _np_dtype

_convert_float = interpreter._convert_float


def _convert(array, kind, to, rounding):
    """To bfloat16 as GPUs round, to nearest even. Where no rounding is named, digits are cut off (Triton 3.6)."""
    if (kind, to) != (tl.float32, tl.bfloat16):
        return _convert_float(array, kind, to, rounding)
    bits = np.frombuffer(array.tobytes(), np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(array.ravel()), 0x7FC0, rounded).astype(np.uint16).reshape(array.shape)


interpreter._convert_float = _convert

_create_dot = interpreter.InterpreterBuilder.create_dot


def _dot(self, a, b, d, *options):
    """A product of bfloat16 would multiply the bits that stand for the numbers (Triton 3.6)."""
    wide = [
        interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if x.dtype.scalar == tl.bfloat16
        else x
        for x in (a, b)
    ]
    return _create_dot(self, *wide, d, *options)


interpreter.InterpreterBuilder.create_dot = _dot

_patch_tensor = interpreter._patch_lang_tensor


def _with_index(tensor, *scope):
    """Loop bounds are arrays of one element, which NumPy 2.4 no longer turns into an int by itself (Triton 3.6)."""
    _patch_tensor(tensor, *scope)
    replace = scope[0].set_attr if scope else setattr
    replace(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _with_index


def _scan(self, tensors):
    """By doubling, whole arrays at a time: element by element, each step of Python, takes seconds (Triton 3.6)."""
    arrays = [tensor.handle.data for tensor in tensors]
    place = np.arange(arrays[0].shape[self.axis])
    shape = [-1 if axis == self.axis else 1 for axis in range(arrays[0].ndim)]
    shift = 1
    while shift < place.size:
        nearer = [np.take(array, np.maximum(place - shift, 0), axis=self.axis) for array in arrays]
        pairs = zip([*nearer, *arrays], [*tensors, *tensors], strict=True)
        joined = self.combine_fn.fn(*(self.to_tensor(array, like.dtype) for array, like in pairs))
        joined = joined if isinstance(joined, tuple) else (joined,)
        far = (place >= shift).reshape(shape)
        arrays = [np.where(far, new.handle.data, old) for new, old in zip(joined, arrays, strict=True)]
        shift *= 2
    return [self.to_tensor(array, like.dtype) for array, like in zip(arrays, tensors, strict=True)]


interpreter.ScanOps.generic_scan = _scan


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of other folders only what runs on a backend: everything else would repeat what the process without an
    interpreter tests."""
    chosen = [each for each in items if Path(__file__).parent in each.path.parents or "backend" in each.fixturenames]
    config.hook.pytest_deselected(items=[each for each in items if each not in chosen])
    items[:] = chosen


@pytest.fixture
def cut() -> Callable[..., ScanConfig]:
    """Tokens cut into tiles of 8 and shares of up to five programs, so that a few dozen are several of each."""

    def choose(total: int, programs: int = 5) -> ScanConfig:
        return choose_scan(total, Device(programs), ScanTuning(block=8, num_warps=1, tokens_per_program=1))

    return choose
