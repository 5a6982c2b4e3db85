"""`python -m prime_kernels` says what is there, and its self-test can fail."""

import os
import subprocess
import sys

import pytest
import torch

import prime_kernels
from prime_kernels import _dispatch, _selftest
from prime_kernels.ops import log_probs as rows


def report(**environment):
    done = subprocess.run(
        [sys.executable, "-m", "prime_kernels"], capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.returncode, done.stdout


def test_report():
    if prime_kernels.available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")
    status, said = report()
    assert status == 0
    assert f"prime_kernels {prime_kernels.__version__} in " in said and f"torch {torch.__version__}" in said
    for name, reason in prime_kernels.available_backends().items():
        assert f"{name:7} {'available' if reason is None else f'not available: {reason}'}" in said
    for op in _dispatch.OPERATIONS:
        assert f"  {op:21} cpu     ok, " in said
    assert " passed in " in said


def test_narrower_instruction_set_is_named():
    if prime_kernels.available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")
    status, said = report(PRIME_KERNELS_CPU_ISA="portable")
    assert status == 0 and "CPU kernels of portable in use" in said


def test_every_operation_has_a_case():
    assert set(_selftest._cases(torch.Generator(), "cpu")) == set(_dispatch.OPERATIONS)


def test_wrong_results_fail(monkeypatch):
    """A kernel that is off by a thousandth, and one that raises."""
    if prime_kernels.available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")
    forward = rows.log_probs_of_views

    def off(*arguments):
        results = forward(*arguments)
        return results._replace(logp=results.logp * 1.001)

    def broken(*arguments):
        raise RuntimeError("driver is gone\nmore")

    for replacement, why in ((off, "off by "), (broken, "RuntimeError: driver is gone")):
        monkeypatch.setattr(rows, "log_probs_of_views", replacement)
        outcomes = {each.op: each for each in _selftest.run() if each.backend == "cpu"}
        assert outcomes["log_probs"].failure.startswith(why) and not outcomes["log_probs"].passed
        assert outcomes["segment_sum"].passed and outcomes["segment_sum"].error < 1e-6
