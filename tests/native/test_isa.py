"""The kernels of every instruction set that this processor has, not only of the widest."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
NARROWER = ["avx512_bf16", "avx512", "avx2", "portable"]


def run(isa, *command):
    environment = {**os.environ, "PRIME_KERNELS_CPU_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def in_use(isa):
    code = "from prime_kernels import _native; print(_native.unavailable_reason() or _native.build_info()['cpu'])"
    return run(isa, "-c", code).stdout.strip()


@pytest.mark.parametrize("isa", NARROWER)
def test_narrower_kernels_pass_the_same_tests(native, isa, seed):
    used = in_use(isa)
    if used != isa:
        assert "PRIME_KERNELS_CPU_ISA: expected one of" in used
        pytest.skip(f"this processor has no {isa}")
    files = [str(HERE / f"test_{name}.py") for name in ("log_probs", "linear_kernels")]
    done = run(isa, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout[-4000:]}"


def test_unknown_instruction_set_is_an_error(native):
    said = in_use("mmx")
    assert "PRIME_KERNELS_CPU_ISA: expected one of" in said and said.count("portable") == 1 and "got mmx" in said
