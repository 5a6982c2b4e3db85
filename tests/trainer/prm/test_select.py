"""Choosing by hand: the five methods over runs of n, equivalent answers as one, tables of several sets and models."""

import json

import pytest

from prime_trainer.cli import main
from prime_trainer.prm.select import Problem, _read, compare


def problem(right, groups, scores):
    scores = {name: scores for name in ("min", "mean", "sum", "last")}
    return Problem(right, [None if g is None else str(g) for g in groups], scores, groups)


# Answer 0 is right in both. In the first the wrong answer has more votes, in the second the right one has weak scores.
FIRST = problem([False, False, True, False], [1, 1, 0, None], [-2.0, -2.0, 3.0, 9.0])
SECOND = problem([True, True, False, False], [0, 0, 1, 2], [-1.0, -1.5, 0.5, -9.0])


def accuracies(problems, n):
    return {(r.method, r.rewards): r.accuracy for r in compare(problems, [n], "b", "m", 10, 0)}


def test_four_of_four():
    first, second = accuracies([FIRST], 4), accuracies([SECOND], 4)
    assert first["mean accuracy of one", ""] == 0.25 and second["mean accuracy of one", ""] == 0.5
    assert first["pass@n", ""] == second["pass@n", ""] == 1.0
    assert first["majority voting", ""] == 0.0 and second["majority voting", ""] == 1.0
    # The highest score of the first has no answer at all: a choice is a choice.
    assert first["best-of-n", "sum"] == 0.0 and second["best-of-n", "sum"] == 0.0
    # sigmoid(3) = 0.95 > 2 sigmoid(-2) = 0.24; sigmoid(-1) + sigmoid(-1.5) = 0.45 < sigmoid(0.5) = 0.62.
    assert first["weighted best-of-n", "sum"] == 1.0 and second["weighted best-of-n", "sum"] == 0.0


def test_runs_of_n_are_disjoint_and_averaged():
    values = accuracies([FIRST], 2)
    assert values["best-of-n", "min"] == 0.0  # wrong in the first run, no answer in the second
    assert values["majority voting", ""] == values["weighted best-of-n", "min"] == 0.5
    assert values["pass@n", ""] == pytest.approx(0.5)  # 1 - C(3, 2) / C(4, 2)
    assert accuracies([FIRST, SECOND], 1)["best-of-n", "last"] == pytest.approx((0.25 + 0.5) / 2)
    assert accuracies([FIRST], 8) == {}  # there are four responses only


def rows(model, benchmark, offset=0.0):
    out = []
    for k in range(6):
        for right, answer, reward in ((1, "1/2", 0.5), (0, "3", 0.2 + offset), (1, "0.5", 0.1), (0, None, -1.0)):
            step = {"min": reward, "mean": reward, "sum": reward, "last": reward}
            text = "x" if answer is None else f"so \\boxed{{{answer}}}"
            out.append({
                "id": k, "prompt": "?", "response": text, "label": right,
                "reward_model": model, "benchmark": benchmark,
                "rewards": {"response": {"single": step, "cumulative": {**step, "last": -reward}}},
            })  # fmt: skip
    return out


def test_command_writes_the_card_table(jsonl, tmp_path, capsys):
    paths = [
        jsonl("a.jsonl", rows("ours", "sums") + rows("ours", "algebra")),
        jsonl("b.jsonl", rows("theirs", "sums", offset=1.0)),
    ]
    words = ["--select.paths", ",".join(map(str, paths)), "--select.n", "1,4,64", "--output", str(tmp_path / "out")]
    assert main(["select", *words]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "out" / "select.md").read_text() and "n = 64" not in printed
    table = printed[printed.index("## n = 4") :]
    assert "| method | reward model | rewards | sums | algebra | mean |" in table
    assert "| majority voting | – | – | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 100.0 |" in table
    assert "| best-of-4 | ours | min | 100.0 [100.0, 100.0] | 100.0 [100.0, 100.0] | 100.0 |" in table
    assert "| best-of-4 | theirs | min | 0.0 [0.0, 0.0] | – | – |" in table
    document = json.loads((tmp_path / "out" / "select.json").read_text())
    (one,) = [
        r for r in document["results"]
        if (r["benchmark"], r["reward_model"], r["method"], r["rewards"], r["n"]) == ("sums", "ours", "pass@n", "", 1)
    ]  # fmt: skip
    assert one["accuracy"] == 0.5 and one["problems"] == 6 and one["low"] <= 0.5 <= one["high"]
    # 1/2 and 0.5 are one answer: with two votes of four they outweigh the 3 even where it is scored above them.
    assert "| weighted best-of-4 | theirs | sum | 100.0 [100.0, 100.0] |" in table


def test_scores_are_taken_over_the_rewards_asked_for(jsonl):
    found = {}
    _read(jsonl("a.jsonl", rows("ours", "sums")), "cumulative", found)
    (problems,) = found.values()
    assert problems["0"].scores == {"min": [0.5, 0.2, 0.1, -1.0], "mean": [0.5, 0.2, 0.1, -1.0],
                                    "sum": [0.5, 0.2, 0.1, -1.0], "last": [-0.5, -0.2, -0.1, 1.0]}  # fmt: skip
    assert problems["0"].right == [True, False, True, False] and problems["0"].answers == ["1/2", "3", "0.5", None]


def test_bad_rows_are_named(jsonl, tmp_path, capsys):
    out = ["--output", str(tmp_path / "out")]
    assert main(["select", *out]) == 2 and "select.paths is required" in capsys.readouterr().err
    row = rows("m", "b")[0]
    unlabelled = jsonl("a.jsonl", [row, {k: v for k, v in row.items() if k != "label"}])
    assert main(["select", "--select.paths", str(unlabelled), *out]) == 2
    assert "a.jsonl, line 2: label is missing" in capsys.readouterr().err
    unscored = jsonl("b.jsonl", [{k: v for k, v in row.items() if k != "rewards"}])
    assert main(["select", "--select.paths", str(unscored), *out]) == 2
    assert "b.jsonl, line 1: rewards is missing" in capsys.readouterr().err
