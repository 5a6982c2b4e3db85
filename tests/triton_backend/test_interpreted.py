"""The Triton kernels, interpreted on the CPU: their own tests, and those of the operations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
OPERATIONS = [
    "candidates", "defaults", "derivatives", "fuzz", "golden", "kept_logits", "linear_log_probs", "log_probs", "pack",
    "ppo_loss", "prm_loss", "rloo_advantages", "segments", "softcap",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "what",
    [["triton_backend/interpreted"], [f"ops/test_{name}.py" for name in OPERATIONS]],
    ids=["kernels", "operations"],
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
    skipped = [
        line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and "test_derivatives" not in line
    ]
    assert " passed" in done.stdout and not skipped, skipped
