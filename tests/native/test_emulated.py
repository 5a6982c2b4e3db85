"""Tests of the operations on the CUDA kernels run by an emulator."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.emulated import build
from helpers.rloo_batches import WRONG

ROOT = Path(__file__).resolve().parents[2]
LONG_BATCHES = "tests/ops/test_long_batches.py"
# Packed tokens; rows of logits, and the operations from hidden states that run on them.
NAMES = ["segments", "rloo_advantages", "ppo_loss", "prm_loss", "pack", "golden"]
NAMES += ["log_probs", "softcap", "fuzz", "linear_log_probs", "linear_losses", "candidates"]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.mark.slow
@pytest.mark.parametrize("multiprocessors", [3, 11])
def test_operations(extension, multiprocessors, seed):
    # More blocks take part only where tokens are many.
    others = [f"tests/ops/test_{name}.py" for name in NAMES] if multiprocessors == 3 else []
    emulated(extension, multiprocessors, seed, [LONG_BATCHES, *others])


def emulated(extension, multiprocessors, seed, select):
    environment = {
        "PRIME_KERNELS_EMULATED": str(extension),
        "PK_EMULATED_MULTIPROCESSORS": str(multiprocessors),
        "PRIME_KERNELS_TEST_BACKENDS": "cuda",
        "PRIME_KERNELS_TEST_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "helpers.emulated", *select],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]


@pytest.mark.slow
def test_a_failed_launch_says_why(extension):
    """The operation, the launch and CUDA's own text."""
    code = """
import torch, helpers.emulated
import prime_kernels as pk
try:
    pk.segment_sum(torch.ones(3), torch.tensor([0, 3]), backend="cuda")
except RuntimeError as error:
    print(error)
"""
    environment = {
        "PRIME_KERNELS_EMULATED": str(extension),
        "PK_EMULATED_FAILURE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.stdout.strip() == (
        "prime_kernels: segment_sum: launch of sum_kernel failed: invalid argument (cudaErrorInvalidValue)"
    ), done.stderr[-2000:]


@pytest.mark.slow
def test_checks_of_a_batch(extension):
    """All of them in one launch, with the messages of the device-side assertions, and none on a good batch."""
    code = """
import torch, helpers.emulated
from helpers.rloo_batches import WRONG, batch, changed
from prime_kernels._native.packed import CUDA

for masked in (False, True):
    given = batch(torch.bfloat16, torch.float32, torch.int32, masked)
    if masked:
        given.process_rewards[1] = float("nan")
    got = CUDA.checked_batch(given)
    assert torch.equal(got.outcomes, given.outcomes.double()) and torch.equal(got.cu_groups, given.cu_groups.long())
CUDA.checked_batch(batch(process=False))
for name, at, value, message in WRONG:
    try:
        CUDA.checked_batch(changed(name, at, value))
    except RuntimeError as error:
        assert "check_kernel failed: device-side assert triggered" in str(error), error
        print(message)
"""
    environment = {
        "PRIME_KERNELS_EMULATED": str(extension),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    messages = [message for *_, message in WRONG]
    assert done.stdout.splitlines() == messages
    assert set(re.findall("Assertion `(.*)` failed", done.stderr)) == set(messages)
