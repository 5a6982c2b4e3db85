"""The Triton kernels, interpreted on the CPU: their own tests, and those of the operations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [
        ["triton_backend/interpreted"],
        ["ops/test_log_probs.py"],
        ["ops/test_fuzz.py"],
        ["ops/test_linear_log_probs.py"],
        ["ops/test_softcap.py"],
        [f"ops/test_{name}.py" for name in ("segments", "rloo_advantages", "ppo_loss", "prm_loss", "pack", "golden")],
        ["ops/test_defaults.py", "ops/test_derivatives.py"],
    ],
    ids=lambda what: what[0],
)
def test_interpreted(what, seed):
    pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-process-rewards[triton]'")
    environment = {
        "TRITON_INTERPRET": "1",
        "PRIME_KERNELS_TEST_BACKENDS": "triton",
        "PRIME_KERNELS_TEST_SEED": str(seed),
        "OMP_NUM_THREADS": "1",
    }
    # The first folder brings the repairs of the interpreter along, whatever else is run.
    folder = TESTS / "triton_backend" / "interpreted"
    chosen = [str(TESTS / each) for each in what]
    select = [] if chosen == [str(folder)] else [f"--deselect={folder.relative_to(TESTS.parent)}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-rs", str(folder), *chosen, *select],
        cwd=TESTS.parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # Second derivatives are a question of other backends for some operations.
    whole = "skipped" not in done.stdout or "ops/test_derivatives.py" in what
    assert "passed" in done.stdout and whole, done.stdout[-2000:]
