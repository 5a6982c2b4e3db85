"""The prompt filter: inclusive bounds, surplus kept for the next batch, bounded rounds, and what if nothing passes."""

import dataclasses
import json
from contextlib import nullcontext

import pytest

from prime_trainer.data.problems import BadRow, Problem, usable
from prime_trainer.models.tokenizers import render
from prime_trainer.rollout import Sample
from prime_trainer.rollout.collector import Collector, NothingPasses
from prime_trainer.verify import Verdict
from prime_trainer.verify.answers import MathAnswer


class Task:
    name = "numbers"
    bad_rows = "error"

    def train(self, start, count):
        return [
            Problem(f"p{i}", [{"role": "user", "content": f"q{i}"}], MathAnswer(str(i)))
            for i in range(start, start + count)
        ]


class Sampler:
    """Token k for the k-th response; remembers what it was asked."""

    limit = None

    def __init__(self, finish="stop"):
        self.asked, self.seeds, self.finish = [], [], finish

    def generate(self, prompts, n, sampling, seeds):
        self.asked.append(len(prompts))
        self.seeds += seeds
        return [[Sample([10 + k, 2], [-1.0, -2.0], self.finish, 0) for k in range(n)] for _ in prompts]


class Verifier:
    """`right[i]` of the n responses to problem i are right."""

    def __init__(self, right, failures=0):
        self.right, self.failures = right, failures

    def score(self, items):
        seen, verdicts = {}, []
        for answer, _ in items:
            i = int(answer.answer)
            k = seen[i] = seen.get(i, -1) + 1
            verdicts.append(Verdict(float(k < self.right(i)), "time limit" if k < self.failures else None))
        return verdicts


@pytest.fixture
def collector(run_config, tokenizer):
    def make(right, sampler=None, failures=0, **changes):
        changes = {"filter": {"low": 0.2, "high": 0.8}, "rollout": {"prompts_per_step": 4, "n": 5}, **changes}
        cfg = run_config(**changes)
        return Collector(
            cfg.rollout, cfg.filter, cfg.seed, Task(), tokenizer, sampler or Sampler(), Verifier(right, failures)
        )

    return make


def clock(stage):
    return nullcontext()


def names(groups):
    return [g.problem for g in groups]


def test_prompts_that_are_too_long_are_left_out_and_counted(collector, tokenizer):
    """Of q1 to q12 the two-digit ones have a token more than fits beside the response."""
    sampler = Sampler()
    made = collector(lambda i: 2, sampler, rollout={"prompts_per_step": 12, "n": 5, "max_new_tokens": 6})
    lengths = [len(render(tokenizer, p.messages)) for p in made.task.train(0, 12)]
    assert lengths == [min(lengths)] * 10 + [min(lengths) + 1] * 2
    sampler.limit = min(lengths) + 6
    made.filter.max_rounds = 1
    groups, values = made.collect(1, clock)
    assert names(groups) == [f"p{i}" for i in range(10)] and values["prompts_too_long"] == 2
    sampler.limit -= 1
    with pytest.raises(NothingPasses, match=rf"step 2: all 12 prompts are too long: .* exceed the {sampler.limit} pos"):
        made.collect(2, clock)


def test_bounds_are_inclusive(collector):
    groups, values = collector(lambda i: i % 6).collect(1, clock)  # accuracies 0, 0.2, 0.4, 0.6, 0.8, 1
    assert names(groups) == ["p1", "p2", "p3", "p4"]
    assert [round(g.accuracy, 1) for g in groups] == [0.2, 0.4, 0.6, 0.8]
    assert values["groups_kept"] == 4 and values["groups_sampled"] >= 5 and values["tokens"] == 4 * 5 * 2
    assert values["entropy"] == pytest.approx(1.5) and values["response_length"] == 2


def test_surplus_waits_for_the_next_batch_and_is_in_the_state(collector):
    right = lambda i: 2 if i >= 2 else 0  # noqa: E731
    made = collector(right)
    first, values = made.collect(1, clock)
    assert names(first) == ["p2", "p3", "p4", "p5"] and values["surplus"] == len(made.surplus) > 0
    waiting = names(made.surplus)
    state = json.loads(json.dumps(made.state_dict()))
    second, _ = made.collect(2, clock)
    assert names(second)[: len(waiting)] == waiting and not set(names(first)) & set(names(second))
    again = collector(right)
    again.load_state_dict(state)
    assert again.position == state["position"]
    repeated, _ = again.collect(2, clock)
    assert repeated == second and again.position == made.position


def test_a_full_surplus_needs_no_sampling(collector):
    sampler = Sampler()
    made = collector(lambda i: 2, sampler)
    made.surplus = made._round(4, 1, clock)[0]
    sampler.asked.clear()
    groups, values = made.collect(2, clock)
    assert sampler.asked == [] and len(groups) == 4 and "reward" not in values


def test_rounds_are_bounded_and_a_short_batch_goes_on(collector):
    sampler = Sampler()
    made = collector(lambda i: 2 if i == 3 else 0, sampler, filter={"low": 0.2, "high": 0.8, "max_rounds": 3})
    groups, _ = made.collect(1, clock)
    assert names(groups) == ["p3"] and len(sampler.asked) == 3 and made.position == sum(sampler.asked)
    assert len(set(sampler.seeds)) == len(sampler.seeds)


def test_nothing_passes(collector):
    made = collector(lambda i: 0, failures=1, filter={"low": 0.2, "high": 0.8, "max_rounds": 2})
    with pytest.raises(NothingPasses) as error:
        made.collect(7, clock)
    message = str(error.value)
    assert "step 7: none of 8 groups has a mean accuracy in [0.2, 0.8]" in message
    assert "their mean is 0.000, 8 answers could not be verified" in message and "filter.low" in message


def test_truncated_groups_are_dropped_if_asked(collector):
    kept, values = collector(lambda i: 2, Sampler("length")).collect(1, clock)
    assert len(kept) == 4 and values["truncated"] == 1.0
    with pytest.raises(NothingPasses):
        collector(lambda i: 2, Sampler("length"), filter={"drop_truncated": True, "max_rounds": 1}).collect(1, clock)


def test_a_failed_verification_is_wrong_and_counted(collector):
    _, values = collector(lambda i: 3, failures=2).collect(1, clock)
    assert values["verifier_failures"] == 8 and values["reward"] == pytest.approx(0.6)


class Broken(Task):
    """The second of every four problems is one that no tokenizer takes."""

    def __init__(self, bad_rows):
        self.bad_rows = bad_rows

    def train(self, start, count):
        return [
            dataclasses.replace(p, messages=[{"role": "user", "content": "\ud800"}], place=f"x.jsonl, line {i + 1}")
            if i % 4 == 1
            else p
            for i, p in enumerate(super().train(start, count), start)
        ]


def test_a_bad_row_is_named_or_left_out_and_counted(collector):
    found = collector(lambda i: 2)
    found.task = Broken("error")
    with pytest.raises(
        BadRow, match=r"x\.jsonl, line 2: the prompt cannot be written in tokens.*task\.bad_rows = 'skip'"
    ):
        found.collect(1, lambda stage: nullcontext())
    found = collector(lambda i: 2)
    found.task = Broken("skip")
    groups, values = found.collect(1, lambda stage: nullcontext())
    assert [g.problem for g in groups] == ["p0", "p2", "p3", "p4"] and values["bad_rows"] == 1
    assert values["groups_sampled"] == 4 + values["surplus"]


def test_held_out_problems_are_checked_before_a_run(tokenizer, capsys):
    problems = Broken("error").train(0, 4)
    with pytest.raises(BadRow, match=r"x\.jsonl, line 2: "):
        usable(tokenizer, problems, "error")
    assert [p.id for p in usable(tokenizer, problems, "skip")] == ["p0", "p2", "p3"]
    assert "left out: x.jsonl, line 2: " in capsys.readouterr().err
