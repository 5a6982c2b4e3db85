"""ProcessBench by hand: predictions, F1, the threshold that one set gives the others."""

import json
import math

import numpy as np
import pytest

from prime_trainer.cli import main
from prime_trainer.prm.processbench import Chain, best_threshold, figures, predict, read_chains

CHAINS = [Chain([1.0, -2.0, 3.0], 1), Chain([0.5, 0.4, -1.0], 2), Chain([2.0, 1.0], -1), Chain([-0.5, 1.0], -1)]


def by_hand(chain, t):
    below = [k for k, q in enumerate(chain.cumulative) if 1 / (1 + math.exp(-q)) < t]
    return below[0] if below else -1


def test_predictions_are_the_first_step_below():
    thresholds = np.linspace(0, 1, 41)
    for chain in CHAINS:
        assert predict(chain, thresholds).tolist() == [by_hand(chain, t) for t in thresholds]


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
    first, second = json.loads((tmp_path / "out" / "processbench.json").read_text())
    assert first["threshold"] == second["threshold"] and first["f1"] == second["f1"] == 1.0
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
