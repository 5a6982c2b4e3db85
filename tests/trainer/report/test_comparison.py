"""Arms by what differs, their means, paired differences and times by hand."""

import json

import pytest

from prime_trainer.config.run_config import RunConfig
from prime_trainer.report.arm_plots import _seconds
from prime_trainer.report.comparison import arm_rows, arms_of, difference_rows, reach_rows
from prime_trainer.report.page import write_report
from prime_trainer.report.run_record import read_record
from prime_trainer.run.metrics import MetricsWriter


@pytest.fixture
def write(tmp_path):
    """`write("prime-0", rewards, seed=0, algorithm={..})`: a run of a second a step for each reward."""

    def run(name, rewards, greedy=(), **settings):
        path = tmp_path / name
        writer = MetricsWriter(path, None)
        (path / "config.json").write_text(RunConfig(output=path, **settings).model_dump_json())
        for step, reward in enumerate(rewards, 1):
            writer.log("rl", step, {"reward": reward, "kept_reward": 0.5, "time/total": 2.0, "time/policy": 1.5})
        for step, accuracy in enumerate(greedy):
            writer.log("eval", step, {"greedy": accuracy, "n": 50})
        writer.close()
        return path

    return run


def read(*paths):
    return [read_record(path) for path in paths]


def test_arms_are_what_differs_beside_the_seed(write):
    of = {}
    for seed in (0, 1):
        model = {"path": f"runs/{seed}/sft/final"}
        of[seed] = [
            write(f"prime-{seed}", [0.5], seed=seed, model=model),
            write(f"rloo-{seed}", [0.5], seed=seed, model=model, algorithm={"process_coef": 0.0}),
        ]
    found = arms_of(read(*of[0], *of[1]))
    assert [(arm.name, [record.path.name for record in arm.records]) for arm in found.arms] == [
        ("process_coef 1", ["prime-0", "prime-1"]),
        ("process_coef 0", ["rloo-0", "rloo-1"]),
    ]
    assert found.arms[1].settings == {"algorithm.process_coef": 0.0} and not found.unstated
    (seeds,) = arms_of(read(of[0][0], of[1][0])).arms
    assert seeds.name == "all runs" and len(seeds.records) == 2


def test_many_differences_are_named_by_what_leaves_the_usual(write):
    runs = [
        write("a", [0.5]),
        write("b", [0.5], prm={"lr": 1e-4}, policy={"lr": 1e-5}),
        write("c", [0.5], prm={"beta": 0.5}, task={"params": {"max_terms": 3}}),
        write("d", [0.5]),
    ]
    found = arms_of(read(*runs))
    assert [arm.name for arm in found.arms[:1]] == ["base"]
    assert found.arms[1].name == "prm.lr 0.0001, policy.lr 1e-05"
    assert found.arms[2].name.startswith("beta 0.5") or "beta 0.5" in found.arms[2].name
    assert [len(arm.records) for arm in found.arms] == [2, 1, 1]


def test_arms_of_long_names_have_those_of_their_folders(write):
    own = {
        "local": {"prm": {"update": "before", "ref_type": "policy"}, "algorithm": {"process_return": "gae"}},
        "rloo": {"algorithm": {"process_coef": 0.0}},
    }
    runs = {arm: [write(f"{arm}-{seed}", [0.5], seed=seed, **own[arm]) for seed in (0, 1)] for arm in own}
    found = arms_of(read(*runs["local"], *runs["rloo"])).arms
    assert [arm.name for arm in found] == ["local", "rloo"] and found[0].settings["prm.update"] == "before"
    other = write("other-2", [0.5], seed=2, **own["local"])  # folders of two names are no arm's name
    names = [arm.name for arm in arms_of(read(*runs["local"], other, *runs["rloo"])).arms]
    assert names == ["base", "update after, ref_type freeze, process_coef 0, process_return sum"]


def test_settings_that_an_older_run_does_not_state_are_listed(write):
    new, old = write("new", [0.5]), write("old", [0.5], algorithm={"process_coef": 0.0})
    config = json.loads((old / "config.json").read_text())
    del config["algorithm"]["whiten"], config["score"]
    (old / "config.json").write_text(json.dumps(config))
    found = arms_of(read(new, old))
    assert found.unstated == ("algorithm.whiten",) and len(found.arms) == 2


def test_means_differences_and_times(write):
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9]
    runs = [
        write("a0", [0.3] * 10, (0.2, 0.4), seed=0),
        write("a1", [0.5] * 10, (0.2, 0.6), seed=1),
        # Longer: what is after step 10, which all runs have, is not compared.
        write("b0", [*rising, 0.0, 0.0], (0.2, 0.5), seed=0, algorithm={"gamma_process": 0.5}),
        write("b1", rising, (0.2, 0.8), seed=1, algorithm={"gamma_process": 0.5}),
        write("b2", rising, (0.2, 0.9), seed=2, algorithm={"gamma_process": 0.5}),
    ]
    found = arms_of(read(*runs))
    assert (found.horizon, found.window) == (10, 1)
    one, other = arm_rows(found)
    half = 12.706 * 0.1  # of 40 and 60 %: the standard error of two values is half their distance
    assert one["held-out accuracy (%)"] == f"50.0 [{50 - 100 * half:.1f}, {50 + 100 * half:.1f}]"
    assert other["final reward (%)"] == "90.0 [90.0, 90.0]" and other["mean reward over all steps (%)"].startswith(
        "54.0 "
    )
    (row,) = difference_rows(found)
    assert row["arm"] == "gamma_process 0.5 minus gamma_process 1" and row["seeds"] == "2"
    assert row["held-out accuracy (%)"] == f"+15.0 [{15 - 1270.6 * 0.05:+.1f}, {15 + 1270.6 * 0.05:+.1f}]"
    assert row["seconds a step"] == "+0 [+0, +0]"
    spent = {stage: _seconds(found.arms[1], stage) for stage in ("policy", "other", "prm")}
    assert spent == {"policy": 1.5, "other": 0.5, "prm": 0.0}
    quick, slow = reach_rows(found)
    assert quick["reaches"] == "40.0 %, the final reward of gamma_process 1"
    assert (quick["step"], quick["seconds"]) == ("4 (40 %)", "8 (40 %)")
    assert (slow["step"], slow["seconds"]) == ("not reached", "not reached")


def test_the_page_has_the_arms(write):
    runs = [write(f"{name}-{seed}", [0.5, 0.6], (0.4, 0.5), seed=seed, algorithm={"process_coef": coef})
            for name, coef in (("prime", 1.0), ("rloo", 0.0)) for seed in (0, 1)]  # fmt: skip
    path = write_report(runs[0], runs[1:])
    text, summary = path.read_text(), (path.parent / "summary.md").read_text()
    for title in ("Arms", "Paired differences", "Time to the other's reward", "Settings of the arms", "Runs"):
        assert title in summary
    assert text.count("<h2>") == 6 and "4 runs in 2 arms" in text
    assert summary.startswith("model: smollm2-135m-instruct, task: chain_sum, steps: 2.")
    assert "| process_coef 0 | seed 1 | outcome-only RLOO |" in summary
    assert {file.stem for file in path.parent.glob("*.png")} == {"reward", "accuracy", "time"}
