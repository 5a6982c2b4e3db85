"""Operations do not depend on torch's default device and default dtype: every allocation names its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from prime_kernels import _dispatch, _selftest

CASES = _selftest._cases(torch.Generator().manual_seed(0), "cpu")


@contextmanager
def default_device() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(before)


@contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS = {
    "set_default_device": default_device,
    "set_default_dtype": default_dtype,
    "with torch.device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("op", sorted(_dispatch.OPERATIONS))
def test_results_and_gradients_are_the_same(op, default, backend):
    call, leaves = CASES[op]
    want = _selftest._results(call, backend, leaves)
    with DEFAULTS[default]():
        got = _selftest._results(call, backend, leaves)
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
