"""Reduced from public reports about verifiers: an answer or program, its reference, and the score that is right."""

import json
import os
from pathlib import Path

import pytest

from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.file_task import problem_answer
from prime_trainer.verify import Verifier
from prime_trainer.verify import sandbox as sandbox_module
from prime_trainer.verify.sandbox import Confinement, Limits, obstacle
from prime_trainer.verify.verifier import CodeOptions

SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", Path(__file__).resolve().parents[4] / "shared"))
CASES = SHARED / "cases" / "verifier.jsonl"
PACKAGES = tuple(TaskConfig().code_packages)

JUDGED_OTHERWISE: dict[str, str] = {}
"""Names of cases whose score is another one here, and why."""


def rows(ability):
    if not CASES.is_file():
        pytest.skip(f"no {CASES}: the shared cases are not here")
    with CASES.open(encoding="utf-8") as lines:
        return [row for row in map(json.loads, lines) if row["ability"] == ability]


def wrong(found, verdicts):
    return [
        (row["name"], row["score"], verdict)
        for row, verdict in zip(found, verdicts, strict=True)
        if (verdict.score != row["score"]) != (row["name"] in JUDGED_OTHERWISE)
    ]


def items(found):
    """As the file task reads rows of this form."""
    return [
        (problem_answer({"ability": r["ability"], "reward_model": {"ground_truth": r["ground_truth"]}}), r["response"])
        for r in found
    ]


@pytest.mark.timeout(600)
def test_mathematical_answers():
    found = rows("math")
    with Verifier(seconds=10.0, workers=2) as verifier:
        verdicts = verifier.score(items(found))
    assert len(found) > 200 and wrong(found, verdicts) == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", sandbox_module.KINDS)
def test_programs(kind):
    found = rows("code")
    reason = obstacle(kind, PACKAGES)
    if reason is not None:
        pytest.skip(reason)
    options = CodeOptions(lambda: Confinement(kind, PACKAGES), Limits(seconds=5.0), workers=4)
    with Verifier(seconds=10.0, workers=1, code=options) as verifier:
        verdicts = verifier.score(items(found))
    assert len(found) > 90 and wrong(found, verdicts) == []
