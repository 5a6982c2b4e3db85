import json

import pytest

from prime_trainer.verify.answers import (
    AssertTests,
    CallTests,
    GymAnswer,
    MathAnswer,
    StdioTests,
    from_json,
    scored_from_json,
)

# The forms that stored files have.
FORMS = [
    ({"kind": "math", "answer": "1/2"}, MathAnswer("1/2"), "1/2"),
    ({"kind": "math", "answer": "4.2", "tolerance": 0.1}, MathAnswer("4.2", 0.1), "4.2"),
    (
        {"kind": "reasoning_gym", "dataset": "chain_sum", "params": {"min_terms": 2}, "entry": {"answer": 5}},
        GymAnswer("chain_sum", {"answer": 5}, {"min_terms": 2}),
        "5",
    ),
    ({"kind": "code", "form": "stdio", "inputs": ["1"], "outputs": ["2"]}, StdioTests(["1"], ["2"]), ""),
    (
        {"kind": "code", "form": "calls", "fn_name": "f", "inputs": [[1, [2]]], "outputs": [None]},
        CallTests("f", [[1, [2]]], [None]),
        "",
    ),
    (
        {"kind": "code", "form": "asserts", "tests": ["t"], "setup": "s", "names": ["f"], "prelude": "p"},
        AssertTests(["t"], "s", ["f"], "p"),
        "",
    ),
]


@pytest.mark.parametrize(("form", "answer", "reference"), FORMS)
def test_answers_keep_their_json_forms(form, answer, reference):
    assert from_json(json.loads(json.dumps(form))) == answer
    assert answer.to_json() == form
    assert answer.reference == reference


def test_fields_that_older_files_leave_out():
    assert from_json({"kind": "reasoning_gym", "dataset": "d", "entry": {}}) == GymAnswer("d", {})
    form = {"kind": "code", "form": "asserts", "tests": [], "setup": "", "names": []}
    assert from_json(form) == AssertTests([], "", [])


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"kind": "maths", "answer": "1"}, r"must be one of math, reasoning_gym, .* got \('maths', None\)"),
        ({"kind": "code", "form": "file"}, r"got \('code', 'file'\)"),
        ({"kind": "math"}, "an answer of kind 'math': .*'answer'"),
        ({"kind": "math", "answer": "1", "tolerence": 1}, "an answer of kind 'math': .*'tolerence'"),
    ],
)
def test_bad_forms_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        from_json(form)


def test_workers_take_no_programs():
    assert scored_from_json(FORMS[0][0]) == MathAnswer("1/2")
    with pytest.raises(ValueError, match="scores no programs, got an answer of kind 'code'"):
        scored_from_json(FORMS[3][0])
