"""A reward of the user's own: scores, limits, failures, and what is refused."""

import os
import threading
import time

import pytest
from pydantic import ValidationError

from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.verify import TIME_LIMIT, Verdict, Verifier, VerifierError
from prime_trainer.verify.answers import MathAnswer, OwnReward, from_json
from prime_trainer.verify.rewards import RewardPool

REWARDS = """
import os, sys, time

def share(texts, problems):
    print("printed", flush=True)
    for text in texts:
        if text == "raise": raise ValueError("no\\nscore")
        if text == "hang": time.sleep(60)
        if text == "exit": os._exit(3)
    return [len(text) / problem["longest"] for text, problem in zip(texts, problems)]

def calls(texts, problems):
    return [len(texts) / 10] * len(texts)

def pid(texts, problems):
    return [os.getpid() / 1e9] * len(texts)

def here(texts, problems):
    return [float(os.path.exists("here") and os.environ["MINE"] == "1")] * len(texts)

def half(texts, problems):
    assert all(problem["question"] for problem in problems)
    return [0.5] * len(texts)

number = 3
too_few = lambda texts, problems: []
too_much = lambda texts, problems: [1.5] * len(texts)
nan = lambda texts, problems: [float("nan")] * len(texts)
nothing = lambda texts, problems: None
"""
PROBLEM = OwnReward({"longest": 8, "answer": 4})


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pool():
    pools = []

    def make(name, seconds=20.0, workers=1, batch=1):
        pools.append(RewardPool(f"my_rewards:{name}", seconds, workers, batch))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def score(pool, *texts):
    return pool.score([(PROBLEM, text) for text in texts])


def test_scores_are_in_order(pool):
    scored = score(pool("share", workers=2, batch=2), "a", "bb", "cccc", "", "dddddddd")
    assert scored == [Verdict(value, None) for value in (0.125, 0.25, 0.5, 0.0, 1.0)]


def test_calls_get_batches_and_processes_stay(pool):
    assert [v.score for v in score(pool("calls", batch=4), *"abcdef")] == [0.4] * 4 + [0.2] * 2
    kept = pool("pid")
    (first,), (second,) = score(kept, "a"), score(kept, "b")
    assert first == second and first.score != os.getpid() / 1e9


def test_it_has_the_environment_and_the_folder_of_the_run(pool, tmp_path, monkeypatch):
    (tmp_path / "here").touch()
    monkeypatch.setenv("MINE", "1")
    assert score(pool("here"), "a") == [Verdict(1.0, None)]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("text", "failure"), [("raise", "ValueError: no score"), ("hang", TIME_LIMIT), ("exit", "worker died")]
)
def test_one_bad_text_costs_no_other_its_score(pool, text, failure, batch):
    scored = score(pool("share", seconds=0.5 if text == "hang" else 20.0, batch=batch), "a", text, "bb", "cccc")
    assert scored == [Verdict(0.125, None), Verdict(0.0, failure), Verdict(0.25, None), Verdict(0.5, None)]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("too_few", "expected as many scores as texts, 1, got 0"),
        ("too_much", "expected scores from 0 to 1, got 1.5"),
        ("nan", "expected scores from 0 to 1, got nan"),
        ("nothing", "expected a list of numbers, got None"),
        ("number", "is no function, got 3"),
        ("absent", "cannot be imported: AttributeError: module 'my_rewards' has no attribute 'absent'"),
    ],
)
def test_what_is_no_reward_ends_the_run(pool, name, said):
    with pytest.raises(VerifierError, match=f"task.reward = 'my_rewards:{name}'.*") as raised:
        score(pool(name), "a")
    assert said in str(raised.value)


def test_ctrl_c_does_not_wait_for_the_limit(pool):
    slow = pool("share", seconds=50.0)
    start = time.monotonic()
    timer = threading.Timer(1.5, lambda: os.kill(os.getpid(), 2))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        score(slow, "hang", "hang")
    assert time.monotonic() - start < 20
    assert score(slow, "a") == [Verdict(0.125, None)]


def test_verifier_gives_whole_responses_and_checks_the_import_at_once(tmp_path):
    cfg = TaskConfig(reward="my_rewards:share", verify_workers=1)
    with Verifier.from_config(cfg) as verifier:
        assert verifier.answer(PROBLEM, "no box") == "no box"
        assert verifier.score([(PROBLEM, "abcd")]) == [Verdict(0.5, None)]
    with pytest.raises(VerifierError, match="No module named 'absent'"):
        Verifier.from_config(TaskConfig(reward="absent:share"))
    with Verifier(1.0, 1) as plain, pytest.raises(ValueError, match=r"need a reward function \(task.reward\)"):
        plain.score([(PROBLEM, "a")])


def test_problems_are_the_rows(tmp_path):
    rows = [f'{{"question": "q{k}", "answer": [{k}], "more": {{"x": {k}}}}}' for k in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    cfg = TaskConfig(kind="jsonl", path="rows.jsonl", eval_size=1, reward="my_rewards:share")
    (held_out,) = load_task(cfg, 0).held_out()
    assert held_out.answer == OwnReward({"question": "q0", "answer": [0], "more": {"x": 0}})
    assert held_out.messages[-1]["content"] == "q0" and from_json(held_out.answer.to_json()) == held_out.answer
    with pytest.raises(ValueError, match="must hold the reference answer"):  # which no reward needs
        load_task(cfg.model_copy(update={"reward": None}), 0)
    gym = load_task(TaskConfig(eval_size=1, reward="my_rewards:share"), 0).held_out()[0].answer
    assert isinstance(gym, OwnReward) and gym.problem.keys() == {"question", "answer", "metadata"}
    assert isinstance(load_task(TaskConfig(eval_size=1), 0).held_out()[0].answer.reference, str)
    assert not isinstance(MathAnswer("4"), OwnReward)


def test_a_run_is_rewarded(run_config):
    pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")
    from prime_trainer import loop
    from prime_trainer.run.jsonl import read_jsonl

    cfg = run_config(steps=1)
    task = cfg.task.model_copy(update={"reward": "my_rewards:half", "verify_workers": 1})
    cfg = cfg.model_copy(update={"task": task})
    loop.run(cfg)
    before, step, after = read_jsonl(cfg.output / "metrics.jsonl")
    assert before["greedy"] == after["greedy"] == step["reward"] == 0.5 and step["verifier_failures"] == 0


@pytest.mark.parametrize("name", ["rewards", "my rewards:f", "my_rewards:", ":f", "a:b:c"])
def test_names_are_checked(name):
    with pytest.raises(ValidationError, match=r"task\.reward must be 'module:function', got"):
        TaskConfig(reward=name)
