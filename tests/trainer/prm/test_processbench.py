"""ProcessBench by hand: predictions, F1, the threshold that one set gives the others; the benchmark's own files."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from prime_trainer.cli import main
from prime_trainer.prm import one_at_a_time, score
from prime_trainer.prm.processbench import Chain, best_threshold, figures, predict, read_chains
from prime_trainer.run.jsonl import read_jsonl

OWN_FILES = Path(__file__).resolve().parents[4] / "shared" / "data" / "processbench"

CHAINS = [Chain([1.0, -2.0, 3.0], 1), Chain([0.5, 0.4, -1.0], 2), Chain([2.0, 1.0], -1), Chain([-0.5, 1.0], -1)]


def by_hand(chain, t, protocol="prefix"):
    before = [0.0, *chain.cumulative] if protocol == "step" else [0.0] * (len(chain.cumulative) + 1)
    below = [k for k, q in enumerate(chain.cumulative) if 1 / (1 + math.exp(before[k] - q)) < t]
    return below[0] if below else -1


@pytest.mark.parametrize("protocol", ["prefix", "step"])
def test_predictions_are_the_first_step_below(protocol):
    thresholds = np.linspace(0, 1, 41)
    for chain in CHAINS:
        assert predict(chain, thresholds, protocol).tolist() == [by_hand(chain, t, protocol) for t in thresholds]


def test_steps_that_only_lower_the_sum_are_told_apart_by_their_own_value():
    # All sums are high, so no prefix of the wrong chain is lower than all of the right one's: its second step is.
    chains = [Chain([3.0, 2.0, 2.5], 1), Chain([0.5, 1.0, 1.5], -1)]
    assert figures("x", chains, best_threshold(chains, "step"), "step").f1 == 1.0
    assert figures("x", chains, best_threshold(chains)).f1 == 0.0


def test_f1_is_the_harmonic_mean():
    # t = 0.4: both errors are found, sigmoid(-0.5) = 0.38 is one false alarm.
    found = figures("x", CHAINS, 0.4)
    assert (found.erroneous, found.correct) == (1.0, 0.5) and found.f1 == pytest.approx(2 / 3)
    assert figures("x", CHAINS, 0.3).f1 == 1.0  # between sigmoid(-1) = 0.27 and sigmoid(-0.5) = 0.38
    assert figures("x", CHAINS[:2], 0.3).f1 == 0.0  # no chain without an error: no F1
    assert 0.2689 < best_threshold(CHAINS) <= 0.3776
    assert figures("x", CHAINS, best_threshold(CHAINS)).f1 == 1.0


def test_tiny_betas_do_not_hide_the_threshold():
    chains = [Chain([q * 1e-3 for q in chain.cumulative], chain.label) for chain in CHAINS]
    assert figures("x", chains, best_threshold(chains)).f1 == 1.0


def test_command(tmp_path, capsys):
    def write(name, chains):
        rows = [{"rewards": {"cumulative": chain.cumulative}, "label": chain.label} for chain in chains]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    tune, other = write("gsm8k.jsonl", CHAINS), write("math.jsonl", [Chain([-0.9], -1), Chain([-2.0], 0)])
    words = ["--processbench.tune", tune, "--processbench.paths", other, "--output", str(tmp_path / "out")]
    assert main(["processbench", *words]) == 0
    assert "| math | 100.0 | 100.0 | 100.0 | 2 |" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "processbench.json").read_text())
    first, second, *by_step = written["figures"]
    assert first["threshold"] == second["threshold"] and first["f1"] == second["f1"] == 1.0
    assert [row["protocol"] for row in (first, second, *by_step)] == ["prefix"] * 2 + ["step"] * 2
    assert written["speed"] is None
    assert main(["processbench"]) == 2
    bad = write("bad.jsonl", [Chain([1.0], 1)])
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 1: label must be -1 or one of 1 steps, got 1"):
        read_chains(tmp_path / bad, "processbench.tune")


def test_chains_without_rewards_are_not_found(tmp_path, capsys):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    rows = [{"rewards": {"cumulative": chain.cumulative}, "label": chain.label} for chain in CHAINS]
    long = [{"rewards": None, "error": "too long", "label": label} for label in (7, -1)]
    path = write("math.jsonl", *rows, *long)
    assert read_chains(path, "x")[-2:] == [Chain([], 7), Chain([], -1)]
    # Two of three erroneous chains and two of three correct ones are right at t = 0.3.
    found = figures("x", read_chains(path, "x"), 0.3)
    assert (found.erroneous, found.correct, found.f1) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert (found.chains, found.unscored) == (6, 2)
    assert main(["processbench", "--processbench.tune", str(path), "--output", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "| math | 66.7 | 66.7 | 66.7 | 6 |" in table
    assert "math: 2 of 6 chains have no rewards and count as not found." in table
    with pytest.raises(ValueError, match=r"x: .*long\.jsonl has no rows with rewards"):
        read_chains(write("long.jsonl", *long), "x")
    for k, rewards in enumerate(
        ({}, [1.0], {"cumulative": []}, {"cumulative": [1.0, "x"]}, {"cumulative": [math.nan]})
    ):
        with pytest.raises(ValueError, match=rf"bad{k}\.jsonl, line 2: rewards\.cumulative must be a list of finite"):
            read_chains(write(f"bad{k}.jsonl", rows[0], {"rewards": rewards, "label": 0}), "x")
    with pytest.raises(ValueError, match=r"none\.jsonl, line 1: needs rewards"):
        read_chains(write("none.jsonl", {"label": 0}), "x")


def test_sets_of_means_and_of_sums_are_not_mixed(tmp_path, capsys):
    def write(name, **value):
        rows = [{"rewards": {"cumulative": chain.cumulative, **value}, "label": chain.label} for chain in CHAINS]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    words = ["processbench", "--output", str(tmp_path / "out"), "--processbench.tune", write("a.jsonl", value="mean")]
    assert main(words) == 0
    assert "Q_k is beta times the mean of the log-ratios" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "processbench.json").read_text())["value"] == "mean"
    assert main([*words, "--processbench.paths", write("b.jsonl")]) == 2
    assert "rewards.value must be alike in all sets, got 'sum' in b and 'mean' in a" in capsys.readouterr().err


@pytest.fixture
def own_files(tmp_path):
    """Six short chains of each of the benchmark's own files."""
    if not OWN_FILES.is_dir():
        pytest.skip(f"no files of ProcessBench in {OWN_FILES}")
    folder = tmp_path / "processbench"
    folder.mkdir()
    for name in ("gsm8k", "math", "olympiadbench"):
        rows = json.loads((OWN_FILES / f"{name}.json").read_text())
        rows.sort(key=lambda row: len(row["problem"]) + sum(map(len, row["steps"])))
        wrong = [row for row in rows if row["label"] >= 0][:3]
        (folder / f"{name}.json").write_text(json.dumps(wrong + [row for row in rows if row["label"] < 0][:3]))
    return folder


@pytest.fixture
def command(own_files, model_dir, prm_dir, tmp_path):
    words = ["processbench", "--processbench.data", str(own_files), "--model.path", str(prm_dir)]
    words += ["--model.dtype", "float32", "--model.device", "cpu", "--score.reference", str(model_dir)]
    return [
        *words,
        "--score.too_long",
        "skip",
        "--score.window",
        "4",
        "--score.page_rows",
        "0",
        "--output",
        str(tmp_path / "out"),
    ]


def test_the_benchmarks_own_files_are_scored_and_resumed(command, own_files, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main([*command, "--processbench.compare", "3"]) == 0
    table = capsys.readouterr().out
    for name in ("gsm8k", "math", "olympiadbench"):
        rows = read_jsonl(out / name / "scores.jsonl")
        given = json.loads((own_files / f"{name}.json").read_text())
        assert [row["id"] for row in rows] == [row["id"] for row in given]
        scored_rows = [row["rewards"] is not None for row in rows]
        assert any(scored_rows)
        for row, each in zip(rows, given, strict=True):
            assert row["rewards"] is None or len(row["rewards"]["cumulative"]) == len(each["steps"])
    found = json.loads((out / "processbench.json").read_text())
    chains = read_chains(out / "gsm8k" / "scores.jsonl", "x")
    for row in found["figures"]:
        if row["set"] == "gsm8k":
            t = best_threshold(chains, row["protocol"])
            assert row["threshold"] == t
            # A value that is the threshold itself is not below it, however the sigmoid is rounded.
            right = [by_hand(chain, t - 1e-12, row["protocol"]) == chain.label for chain in chains]
            assert (row["erroneous"], row["correct"]) == pytest.approx((sum(right[:3]) / 3, sum(right[3:]) / 3))
    assert "EurusPRM-Stage2 (7B) | – | 47.3 | 35.7 | 21.2 | 34.7 |" in table
    assert "IPVRM, Qwen3-0.6B | step | – | – | – | 39.1 (four sets) |" in table
    speed = found["speed"]
    assert speed["chains"] == 18 and speed["seconds"] > 0 and speed["compared"] == 3
    assert speed["largest_difference"] < 1e-4
    before = (out / "processbench.json").read_bytes()

    assert main(command) == 2 and "--resume" in capsys.readouterr().err
    # Interrupted in the second set: what is there stays, the rest is scored, all comes out the same.
    whole = {name: (out / name / "scores.jsonl").read_bytes() for name in ("gsm8k", "math", "olympiadbench")}
    lines = whole["math"].splitlines(keepends=True)
    (out / "math" / "scores.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])
    shutil.rmtree(out / "olympiadbench")
    scored = []
    rows_of = score._rows
    monkeypatch.setattr(score, "_rows", lambda window, *rest: scored.extend(window) or rows_of(window, *rest))
    assert main([*command, "--resume"]) == 0
    assert [item.row["id"].rsplit("-", 1)[0] for item in scored] == ["math"] * 2 + ["olympiadbench"] * 6
    assert {name: (out / name / "scores.jsonl").read_bytes() for name in whole} == whole
    assert json.loads((out / "processbench.json").read_text())["figures"] == json.loads(before)["figures"]


def test_a_prm_of_means_is_scored_and_compared_as_one(command, prm_dir, model_dir, tmp_path, capsys):
    own = tmp_path / "prefix"
    shutil.copytree(prm_dir, own)
    (own / "prm.json").write_text('{"kind": "prefix", "beta": 4.0}')
    assert main([*command, "--model.path", str(own), "--processbench.compare", "3"]) == 0
    found = json.loads((tmp_path / "out" / "processbench.json").read_text())
    assert found["value"] == "mean" and found["speed"]["compared"] == 3
    assert found["speed"]["largest_difference"] < 1e-4
    for row in read_jsonl(tmp_path / "out" / "gsm8k" / "scores.jsonl"):
        if (rewards := row["rewards"]) is not None:
            ends = rewards["cu_steps"][1:]
            means = [sum(rewards["token_rewards"][:end]) / end for end in ends]
            assert rewards["cumulative"] == pytest.approx(means, abs=1e-5)
            assert np.diff([0.0, *means]).tolist() == pytest.approx(rewards["single"], abs=1e-5)


def test_a_model_that_is_another_one_does_not_go_on(command, model_dir, capsys):
    assert main([*command, "--processbench.compare", "0"]) == 0
    other = [str(model_dir) if k and command[k - 1] == "--model.path" else word for k, word in enumerate(command)]
    assert main([*other, "--resume"]) == 2
    assert "the configuration has changed" in capsys.readouterr().err


def test_sets_that_cannot_be_used_are_named(command, own_files, tmp_path, capsys):
    (own_files / "gsm8k.json").rename(own_files / "gsm.json")
    assert main(command) == 2
    assert "has no gsm8k.json, on which the threshold is chosen" in capsys.readouterr().err
    math = str(own_files / "math.json")
    assert main([*command, "--processbench.tune", math, "--processbench.paths", math]) == 2
    assert "two sets are called 'math'" in capsys.readouterr().err
    assert main(["processbench", "--processbench.tune", math, "--output", str(tmp_path / "out")]) == 2
    assert "score.reference is required" in capsys.readouterr().err


def test_one_at_a_time_needs_a_response():
    with pytest.raises(ValueError, match="encoded: expected at least one response, got none"):
        one_at_a_time.compare([], None, (None, None))
