"""The trainers themselves, in an environment of their own: `make test-integrations` sets it up and runs these tests.

verl, OpenRLHF and SkyRL come without their dependencies, which are large and want a GPU: what their modules import
beyond what is there is stood in for by empty modules, in a process for each trainer.
"""

import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import pytest
import torch
from packaging.requirements import Requirement

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[3]
REQUIREMENTS = ROOT / "tests" / "integrations" / "requirements.txt"


class StandIns:
    """Finds and loads modules that have every name."""

    def __init__(self, names):
        self.names = [name for name in names if importlib.util.find_spec(name) is None]

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec):
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=f"{spec.name}.{name}")
        return module

    def exec_module(self, module):
        pass


@pytest.fixture(scope="session")
def stand_in():
    """Give names of packages; those that are not installed can be imported from then on."""
    return lambda *names: sys.meta_path.append(StandIns(names))


@pytest.fixture(scope="session")
def tested_version():
    """The version of a package that these tests are for."""
    pins = map(Requirement, (line for line in REQUIREMENTS.read_text().splitlines() if "==" in line))
    here = {pin.name: str(pin.specifier)[2:] for pin in pins if pin.marker is None or pin.marker.evaluate()}
    return here.__getitem__


@pytest.fixture
def rows():
    """Logits [3, 5, 101] that want a gradient, and a token of each row."""
    return (torch.randn(3, 5, 101) * 4).requires_grad_(), torch.randint(101, (3, 5))


@pytest.fixture
def assert_same():
    """A function of fresh logits gives the same values and gradient as another, to float32 rounding."""

    def check(ours, theirs, logits):
        mine, original = (logits.detach().clone().requires_grad_() for _ in range(2))
        got, want = ours(mine * 1.0), theirs(original * 1.0)
        got, want = ([each] if isinstance(each, torch.Tensor) else [*each] for each in (got, want))
        assert len(got) == len(want)
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)
        weights = [torch.randn_like(each) for each in got]
        for results in (got, want):
            torch.autograd.backward(
                *zip(*((r, w) for r, w in zip(results, weights, strict=True) if r.requires_grad), strict=True)
            )
        torch.testing.assert_close(mine.grad, original.grad, atol=2e-5, rtol=1e-4)
        assert mine.grad.abs().sum() > 0

    return check
