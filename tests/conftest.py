"""Fixtures for all tests: backends, fresh seeds, shared reference vectors, a fixed budget for hypothesis."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# A shell starts its background jobs with SIGINT ignored, and Python then leaves it so: Ctrl-C could not be tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# nohup does the same with SIGHUP, for children too.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Tests are collected without touching sys.path; this lets them share support.py.
sys.path.insert(0, str(Path(__file__).parent))

import prime_kernels

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", ROOT.parent / "shared"))
# What the fixture `backend` runs on; tests/triton_backend has its own process, with Triton's interpreter.
BACKENDS = os.environ.get("PRIME_KERNELS_TEST_BACKENDS", "eager cpu").split()
# Where the tests make their tensors: "cuda" puts the tests of an operation on a GPU, as bench/gpu.sh does.
DEVICE = os.environ.get("PRIME_KERNELS_TEST_DEVICE", "cpu")
# The same numbers in every run, so that what fails is what changed; "random" draws new ones, to hunt with.
CHOSEN = os.environ.get("PRIME_KERNELS_TEST_SEED", "0")
SEED = int.from_bytes(os.urandom(4), "little") if CHOSEN == "random" else int(CHOSEN)

settings.register_profile("prime", max_examples=25, deadline=None, derandomize=CHOSEN == "0")
settings.load_profile("prime")


def pytest_configure() -> None:
    torch.set_num_threads(1)
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)


@pytest.fixture(autouse=True)
def seed() -> int:
    """The start of a test's random numbers; a failing test shows the seed that repeats it."""
    print(f"PRIME_KERNELS_TEST_SEED={SEED}")
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend with kernels that take CPU tensors."""
    reason = prime_kernels.available_backends()[request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    return request.param


@pytest.fixture(scope="session")
def golden() -> list[dict]:
    """The vectors of the public reference code; tests that need them skip where they are absent."""
    path = SHARED / "golden" / "prime_reference_vectors.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}: set PRIME_KERNELS_SHARED to the folder that holds golden/")
    return json.loads(path.read_text())
