"""Choosing by hand: the five methods over runs of n, equivalent answers as one, tables of several sets and models."""

import json
import math
import random
from fractions import Fraction

import pytest

from prime_trainer.cli import main
from prime_trainer.prm.select import Problem, _read, compare, left_out


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


def by_counting(problem, n):
    """What the methods give for one problem, written out."""
    right, groups, scores = problem.right, problem.groups, problem.scores["mean"]
    runs = [range(at, at + n) for at in range(0, len(right), n)]

    def heaviest(run, weights):
        totals = {g: sum(weights[k] for k in run if groups[k] == g) for g in groups}
        # Of equals, the answer that comes first.
        return next(k for k in run if totals[groups[k]] == max(totals.values()))

    def share(choose):
        return sum(right[choose(run)] for run in runs) / len(runs)

    # Drawn one by one without replacement, none right: (wrong / 64) * ((wrong - 1) / 63) ..
    none = math.prod(Fraction(max(0, right.count(False) - k), len(right) - k) for k in range(n))
    sigmoids = [1 / (1 + math.exp(-score)) for score in scores]
    return {
        ("mean accuracy of one", ""): right.count(True) / len(right),
        ("pass@n", ""): float(1 - none),
        ("majority voting", ""): share(lambda run: heaviest(run, [1] * len(right))),
        ("best-of-n", "mean"): share(lambda run: max((scores[k], k) for k in run)[1]),
        ("weighted best-of-n", "mean"): share(lambda run: heaviest(run, sigmoids)),
    }


@pytest.mark.parametrize("n", [32, 64])
def test_many_responses_against_plain_counting(n):
    rng = random.Random(n)
    problems = []
    for number in range(12):
        right = [rng.random() < 0.025 * number for _ in range(64)]
        groups = [0 if r else rng.choice([1, 2, 3, 4]) for r in right]
        scores = {name: [rng.gauss(r, 1.0) for r in right] for name in ("min", "mean", "sum", "last")}
        problems.append(Problem(right, [str(g) for g in groups], scores, groups))
    counted = [by_counting(p, n) for p in problems]
    want = {method: sum(one[method] for one in counted) / 12 for method in counted[0]}
    found = accuracies(problems, n)
    assert {method: found[method] for method in want} == pytest.approx(want)
    # None is trivially 0 or 1, and no two are the same.
    assert len(set(want.values())) == len(want) and all(0 < value < 1 for value in want.values())


def test_what_is_left_out_is_said():
    found = {"a": FIRST, "b": problem([True], [0], [1.0]), "c": SECOND}
    assert left_out(found, [4, 1, 2]) == "n = 2, 4 left out: problem b has 1 response"
    assert left_out(found, [1]) is None and left_out({"a": FIRST}, [1, 2, 4]) is None


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
    printed, said = capsys.readouterr()
    assert "select: sums, ours: n = 64 left out: problem 0 has 4 responses" in said and said.count("left out") == 3
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
    _read(jsonl("a.jsonl", rows("ours", "sums")), "cumulative", found, {})
    (problems,) = found.values()
    assert problems["0"].scores == {"min": [0.5, 0.2, 0.1, -1.0], "mean": [0.5, 0.2, 0.1, -1.0],
                                    "sum": [0.5, 0.2, 0.1, -1.0], "last": [-0.5, -0.2, -0.1, 1.0]}  # fmt: skip
    assert problems["0"].right == [True, False, True, False] and problems["0"].answers == ["1/2", "3", "0.5", None]


def test_chats_are_different_problems(jsonl):
    def chat(question, answer):
        turns = [("user", "Hello."), ("assistant", "\\boxed{9}"), ("user", question), ("assistant", answer)]
        return [{"role": role, "content": content} for role, content in turns]

    scored = {key: rows("m", "b")[0][key] for key in ("label", "rewards", "reward_model", "benchmark")}
    data = [
        scored | {"response": chat(q, a)} for q in ("1 + 1?", "2 + 3?") for a in ("\\boxed{2}", "\\boxed{5}", "two")
    ]
    data.append(scored | {"prompt": chat("1 + 1?", "")[:3], "response": "\\boxed{3}"})
    found = {}
    _read(jsonl("a.jsonl", data), "single", found, {})
    first, second = found["b", "m"].values()
    assert first.answers == ["2", "5", None, "3"] and second.answers == ["2", "5", None]
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: a row needs its prompt"):
        _read(jsonl("b.jsonl", [scored | {"response": "5"}]), "single", {}, {})


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
    for k, rewards in enumerate(([1.0], {"single": [1.0]}, {"response": {"single": {"min": 1.0}}}, row["rewards"])):
        if rewards is row["rewards"]:
            rewards = json.loads(json.dumps(rewards))
            rewards["response"]["single"]["mean"] = math.nan
        foreign = jsonl(f"c{k}.jsonl", [row, row | {"rewards": rewards}])
        assert main(["select", "--select.paths", str(foreign), *out]) == 2
        name = "min" if k < 2 else "mean"
        assert f"c{k}.jsonl, line 2: rewards.response.single.{name} must be a finite" in capsys.readouterr().err


def test_means_and_sums_are_not_mixed(jsonl, tmp_path, capsys):
    means = rows("ours", "sums")
    for row in means:
        row["rewards"]["value"] = "mean"
    words = ["--select.n", "4", "--output", str(tmp_path / "out")]
    two = f"{jsonl('a.jsonl', means)},{jsonl('b.jsonl', rows('theirs', 'sums'))}"
    assert main(["select", "--select.paths", two, *words]) == 0
    assert "Rewards of ours are of means over tokens, others of sums." in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "select.json").read_text())["results"]
    assert {(r["reward_model"], r["value"]) for r in results} == {("ours", "mean"), ("theirs", "sum")}
    path = jsonl("c.jsonl", rows("ours", "algebra"))
    assert main(["select", "--select.paths", f"{jsonl('a.jsonl', means)},{path}", *words]) == 2
    assert "c.jsonl, line 1: rewards.value is 'sum', other rewards of 'ours' are of 'mean'" in capsys.readouterr().err
    means[1]["rewards"]["value"] = "median"
    assert main(["select", "--select.paths", str(jsonl("d.jsonl", means)), *words]) == 2
    assert "d.jsonl, line 2: rewards.value must be 'sum' or 'mean', got 'median'" in capsys.readouterr().err
