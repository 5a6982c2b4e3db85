"""Selection of a backend: argument, use_backend, environment, fastest."""

import re
import sys
import warnings
from typing import NamedTuple

import pytest
import torch
from helpers.support import offsets

import prime_kernels as pk
from prime_kernels import _dispatch, _native, _triton

X = torch.zeros(3)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("PRIME_KERNELS_BACKEND", raising=False)


@pytest.fixture
def extension(monkeypatch):
    """As if the extension were there: selection never runs it."""
    monkeypatch.setattr(_native, "unavailable_reason", lambda: None)


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setattr(_native, "unavailable_reason", lambda: "not built: pip install prime-process-rewards")
    monkeypatch.setattr(_dispatch, "_warned_of_missing_extension", False)


def test_order_of_selection(extension, monkeypatch):
    assert _dispatch.resolve("segment_scan", X, None) == "cpu"
    monkeypatch.setenv("PRIME_KERNELS_BACKEND", "eager")
    assert _dispatch.resolve("segment_scan", X, None) == "eager"
    with pk.use_backend("cpu"):
        assert _dispatch.resolve("segment_scan", X, None) == "cpu"
        assert _dispatch.resolve("segment_scan", X, "eager") == "eager"
        with pk.use_backend("eager"):
            assert _dispatch.resolve("segment_scan", X, None) == "eager"
    assert _dispatch.resolve("segment_scan", X, None) == "eager"


def test_preference_passes_over_what_it_cannot_run(extension):
    with pk.use_backend("cpu"):
        assert _dispatch.resolve("ppo_loss", X, None) == "cpu"
        assert _dispatch.resolve("segment_scan", X.double(), None) == "eager"
        assert _dispatch.resolve("segment_scan", X.to("meta"), None) == "eager"


def test_argument_never_falls_back(extension):
    with pytest.raises(TypeError, match=r"backend: expected float32, .*'cpu', got torch.float64"):
        pk.segment_scan(X.double(), offsets([3]), backend="cpu")
    with pytest.raises(ValueError, match=r"backend: expected cpu tensors for 'cpu', got meta"):
        _dispatch.resolve("segment_scan", X.to("meta"), "cpu")


def test_float64_runs_on_eager_by_default(extension):
    assert pk.segment_scan(X.double(), offsets([3])).dtype == torch.float64


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_unavailable_backends_say_why(name, monkeypatch):
    reason = pk.available_backends()[name]
    if reason is None:
        pytest.skip(f"backend {name!r} is available here")
    message = re.escape(f"name: backend '{name}' is not available: {reason}")
    with (
        pytest.raises(pk.BackendUnavailable, match=message),
        pk.use_backend(name),
    ):
        pass
    monkeypatch.setenv("PRIME_KERNELS_BACKEND", name)
    with pytest.raises(pk.BackendUnavailable, match=f"PRIME_KERNELS_BACKEND: backend '{name}' is not available"):
        pk.segment_sum(X, offsets([3]))


def test_without_triton_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton.language", None)
    _triton._import_error.cache_clear()
    try:
        reason = pk.available_backends()["triton"]
    finally:
        _triton._import_error.cache_clear()
    assert "triton cannot be imported" in reason and "pip install 'prime-process-rewards[triton]'" in reason


def test_triton_is_the_default_of_cuda_tensors(monkeypatch):
    """As if it and a GPU were there: selection looks at the tensor's device, dtype and operation alone."""

    class OnGpu(NamedTuple):
        dtype: torch.dtype
        device: torch.device = torch.device("cuda", 0)

    half, double = OnGpu(torch.bfloat16), OnGpu(torch.float64)
    monkeypatch.setattr(_triton, "unavailable_reason", lambda: None)
    assert [_dispatch.resolve(op, half, None) for op in ("log_probs", "log_ratios")] == ["triton", "triton"]
    assert _dispatch.resolve("log_probs", double, None) == _dispatch.resolve("ppo_loss", double, None) == "eager"
    with pytest.raises(TypeError, match=r"backend: expected float32, .*'triton', got torch.float64"):
        _dispatch.resolve("log_probs", double, "triton")
    monkeypatch.setattr(_triton, "interpreted", lambda: False)
    with pytest.raises(ValueError, match=r"backend: expected cuda tensors for 'triton', got cpu"):
        _dispatch.resolve("log_probs", X, "triton")
    monkeypatch.setattr(_triton, "unavailable_reason", lambda: "no device")
    assert _dispatch.resolve("log_probs", half, None) == "eager"


def test_unknown_names(monkeypatch):
    with (
        pytest.raises(ValueError, match=r"name: expected one of 'eager', 'cpu', 'triton', 'cuda', got 'fast'"),
        pk.use_backend("fast"),
    ):
        pass
    monkeypatch.setenv("PRIME_KERNELS_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"PRIME_KERNELS_BACKEND: expected one of"):
        pk.segment_sum(X, offsets([3]))


def test_missing_extension_warns_once_and_runs_eager(no_extension):
    with pytest.warns(RuntimeWarning, match=r"runs CPU tensors on 'eager': not built") as caught:
        pk.segment_scan(X, offsets([3]))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pk.segment_scan(X, offsets([3]))
    with pytest.raises(pk.BackendUnavailable, match=r"'cpu' is not available: not built: pip install"):
        pk.segment_scan(X, offsets([3]), backend="cpu")


def test_available_backends():
    backends = pk.available_backends()
    assert list(backends) == ["eager", "cpu", "triton", "cuda"] and backends["eager"] is None
