"""Launches of an operation on CUDA tensors, counted without a GPU on tensors that have no storage."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import prime_kernels as pk

# Operators that ask, only allocate, or only look at memory another way.
FREE = {"device", "empty", "view", "select", "slice", "detach", "alias", "unbind", "as_strided", "expand", "unsqueeze"}
KERNELS = ("check_rloo_kernel", "rloo_kernel", "whiten_kernel")


class Launches(TorchDispatchMode):
    """Names of the operators that launch something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().split("::")[1].split(".")[0]
        if name.removeprefix("new_").split("_")[0] not in FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Kernel:
    """Stands in for a Triton kernel."""

    def __init__(self, name: str, names: list[str]) -> None:
        self.name, self.names = name, names

    def __getitem__(self, grid):
        return lambda *arguments, **options: self.names.append(self.name)


@pytest.fixture
def launches(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-process-rewards[triton]'")
    from prime_kernels import _triton
    from prime_kernels._triton import rloo
    from prime_kernels._triton._launch_config import Device, choose_scan

    counted = Launches()
    for name in KERNELS:
        monkeypatch.setattr(rloo, name, Kernel(name, counted.names))
    monkeypatch.setattr(rloo, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(rloo, "scan_config", lambda total, device: choose_scan(total, Device(132)))
    monkeypatch.setattr(rloo, "arrivals", lambda device: torch.empty(1, dtype=torch.int32, device=device))
    monkeypatch.setattr(_triton, "unavailable_reason", lambda: None)
    with FakeTensorMode(), counted:
        yield counted


@pytest.mark.parametrize("rewards, outcomes, offsets", [
    (torch.float32, torch.float64, torch.int64),
    (torch.float32, torch.float32, torch.int32),
    (torch.bfloat16, torch.bfloat16, torch.int32),
], ids=["as the kernels take them", "float32 and int32", "bfloat16 and int32"])  # fmt: skip
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_rloo_advantages(launches, rewards, outcomes, offsets, masked):
    batch = (
        torch.empty(1000, dtype=rewards, device="cuda"),
        torch.empty(8, dtype=outcomes, device="cuda"),
        torch.empty(9, dtype=offsets, device="cuda"),
        torch.empty(3, dtype=offsets, device="cuda"),
    )
    mask = torch.empty(1000, dtype=torch.bool, device="cuda") if masked else None
    launches.names.clear()
    pk.rloo_advantages(*batch, reward_mask=mask, backend="triton")
    assert launches.names == list(KERNELS)


def test_the_count_counts(launches):
    """What "eager" launches: far more."""
    values = torch.empty(1000, device="cuda")
    launches.names.clear()
    (values.double() * 2).sum()
    assert launches.names == ["_to_copy", "mul", "sum"]
