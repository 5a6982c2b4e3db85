"""The kernels of the wide instruction sets in plain C++, on a processor that need not have them."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.emulated import build_instruction_sets

ROOT = Path(__file__).resolve().parents[2]
TESTS = "tests/native/test_linear_kernels.py"


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    pytest.importorskip("pybind11", reason="pybind11 is not installed")
    if platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip("the compiler of another processor does not know these instructions")
    return build_instruction_sets(tmp_path_factory.mktemp("instruction_sets"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("isa", ["avx512", "avx512_bf16", "amx"])
def test_emulated(extension, isa, seed):
    environment = {
        "PRIME_KERNELS_EMULATED_ISA": str(extension),
        "PRIME_KERNELS_CPU_ISA": isa,
        "PRIME_KERNELS_TEST_SEED": str(seed),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    # Scratch memory is counted in a process of its own, without the emulator.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rs", "-p", "helpers.emulated", "-k", "not scratch", TESTS]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
