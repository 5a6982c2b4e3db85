"""The page of targets has the tables that its script writes, and the script counts what the operations do."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu_targets.md"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "bench" / "gpu_targets.py"))


def test_the_page_has_what_the_script_writes(script, tmp_path, monkeypatch):
    page, text = tmp_path / "page.md", PAGE.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?s)(?<=<!-- tables -->).*(?=<!-- end of tables -->)", "old", text))
    monkeypatch.setattr(sys, "argv", ["gpu_targets.py", str(page)])
    script["main"]()
    assert page.read_text(encoding="utf-8") == text, "run python bench/gpu_targets.py docs/gpu_targets.md"
    _, _, *rows = [line for line in text.splitlines() if line.count("|") > 10]
    assert len(rows) == 17 and all(line.endswith(f"| {script['UNMEASURED']} |") for line in rows)


def test_work_of_a_loss(script):
    """By hand: three products, float32 logits that are written and read twice, their gradient in 16 bits."""
    n, d, v = script["LLAMA"]
    work = script["counted"](script["nll"](n, d, v))
    assert work.flops == [2 * n * d * v] * 3
    operands, logits = 2 * (n * d + v * d), n * v
    gradients = 2 * (logits + v * d + n * d)
    assert work.of_products == operands + 4 * logits + 2 * gradients
    # Read for the log-probs, and for the gradient; then gradients times that of the loss.
    assert work.of_kernels == pytest.approx(4 * logits + 6 * logits + 2 * operands, rel=1e-3)


def test_time_of_work(script):
    """Products alone, then with what they move; half a wave of the last programs, launches and barriers."""
    gpu = script["Gpu"]("", 1e12, 1e14)
    work = script["Work"](
        flops=[2 * 10**14], of_products=10**12, of_kernels=10**12, launches=10, tails=1e11, barriers=5
    )
    assert work.seconds(gpu, False) == pytest.approx(2 + 1.1 + 10 * script["LAUNCH"] + 5 * script["BARRIER"])
    assert work.seconds(gpu, True) - work.seconds(gpu, False) == pytest.approx(1)
    slow = script["Work"](of_kernels=10**12, issue=2.0)
    assert slow.seconds(gpu, False) == pytest.approx(2)


def test_barriers_are_those_of_the_machine_code(script):
    text = (ROOT / "tests" / "triton_backend" / "test_specialised.py").read_text(encoding="utf-8")
    assert re.search(r'"returns": \[(\d+)\]', text)[1] == str(script["RLOO_BARRIERS"])
