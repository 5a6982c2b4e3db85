"""Advantages of every estimator and return against loops in float64; groups are ragged, some responses empty."""

import itertools
import math
import statistics

import pytest
import torch
from pydantic import ValidationError

from prime_trainer.config.sections import AlgorithmConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.train.advantages import advantages_of
from prime_trainer.train.batch import Batch
from prime_trainer.train.prm_step import Rewards

LENGTHS = [[3, 5, 0, 2], [4], [1, 6, 2], [0, 2]]
OUTCOMES = [[1.0, 0.0, 1.0, 0.25], [1.0], [0.0, 0.0, 1.0], [1.0, 0.0]]


def batch_of(order=(0, 1, 2, 3)):
    return Batch([
        Group([5, 6], [Response(list(range(3, 3 + n)), a) for n, a in zip(LENGTHS[g], OUTCOMES[g], strict=True)])
        for g in order
    ])  # fmt: skip


def rewards_of(batch, masked, scale=1.0):
    values = scale * torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(1))
    if not masked:
        return Rewards(values, None)
    mask = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[batch.cu_seqlens[1:][batch.cu_seqlens.diff() > 0] - 1] = True
    return Rewards(torch.where(mask, values, 0.0), mask.nonzero().squeeze(1))


def by_response(batch, rewards):
    """[[[(reward, has) of each token] of each response] of each group]"""
    starts, at, groups = batch.cu_seqlens.tolist(), 0, []
    has = torch.ones(batch.num_tokens, dtype=torch.bool) if rewards.mask is None else rewards.mask
    pairs = list(zip(rewards.values.double().tolist(), has.tolist(), strict=True))
    for group in batch.groups:
        count = len(group.responses)
        groups.append([pairs[starts[r] : starts[r + 1]] for r in range(at, at + count)])
        at += count
    return groups


def others(values, k):
    rest = [v for j, v in enumerate(values) if j != k and v is not None]
    return sum(rest) / len(rest) if rest else 0.0


def std(values):
    return statistics.stdev(values) if len(values) > 1 else 0.0


def outcome_loop(batch, cfg):
    out = []
    for group in batch.groups:
        own = [r.outcome if r.ids else None for r in group.responses]
        there = [a for a in own if a is not None]
        for k, (response, a) in enumerate(zip(group.responses, own, strict=True)):
            if a is None:
                continue
            value = {
                "rloo": a - others(own, k),
                "grpo": (a - statistics.fmean(there)) / (std(there) + 1e-6),
                "reinforce": a,
            }[cfg.estimator]
            out += [value * cfg.gamma_outcome ** (len(response.ids) - 1 - t) for t in range(len(response.ids))]
    return out


def process_loop(batch, rewards, cfg):
    groups = by_response(batch, rewards)
    if cfg.process_return == "min":
        future = [[[min(v for v, has in r[t:] if has) for t in range(len(r))] for r in group] for group in groups]
        largest = max(abs(v) for group in future for r in group for v in r)
        if cfg.normalize_process:
            future = [[[v / (largest + 1e-6) for v in r] for r in group] for group in future]
        lows = [[r[0] if r else None for r in group] for group in future]
        return [v - others(lows[g], k) for g, group in enumerate(future) for k, r in enumerate(group) for v in r]
    running = []
    for r in itertools.chain(*groups):
        total = 0.0
        for v, has in r:
            total += v
            running += [total] * has
    scale = std(running) + 1e-6
    out = []
    for group in groups:
        own = [v / scale for r in group for v, has in r if has]
        for r in group:
            deltas = [(v / scale - statistics.fmean(own)) / (std(own) + 1e-6) if has else 0.0 for v, has in r]
            factor = cfg.gamma_process * cfg.gae_lambda
            out += [sum(factor ** (u - t) * deltas[u] for u in range(t, len(r))) for t in range(len(r))]
    return out


def whiten_loop(values):
    mean = statistics.fmean(values)
    return [(v - mean) / math.sqrt(statistics.variance(values) + 1e-8) for v in values]


@pytest.mark.parametrize("whiten", [None, "sum", "source"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("process", ["min", "gae"])
@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
def test_advantages_are_the_formulas(estimator, process, masked, whiten):
    cfg = AlgorithmConfig(
        estimator=estimator, process_return=process, process_coef=0.7, outcome_coef=1.3, gamma_outcome=0.9,
        gamma_process=0.8 if process == "gae" else 1.0, gae_lambda=0.9, whiten=whiten is not None,
        whiten_of=whiten or "sum",
    )  # fmt: skip
    batch = batch_of()
    rewards = rewards_of(batch, masked)
    sources = [outcome_loop(batch, cfg), process_loop(batch, rewards, cfg)]
    if whiten == "source":
        sources = [whiten_loop(values) for values in sources]
    want = [1.3 * a + 0.7 * p for a, p in zip(*sources, strict=True)]
    if whiten == "sum":
        want = whiten_loop(want)
    got = advantages_of(batch, rewards, cfg)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("estimator", ["grpo", "reinforce"])
@pytest.mark.parametrize("whiten", [True, False])
def test_outcomes_alone(estimator, whiten):
    cfg, batch = AlgorithmConfig(estimator=estimator, process_coef=0.0, whiten=whiten), batch_of()
    want = outcome_loop(batch, cfg)
    want = torch.tensor(whiten_loop(want) if whiten else want, dtype=torch.float64)
    torch.testing.assert_close(advantages_of(batch, None, cfg).double(), want, atol=2e-5, rtol=2e-5)


def test_sources_whitened_apart_are_rloos_whitened_apart():
    batch = batch_of()
    rewards = rewards_of(batch, masked=False)

    def of(**options):
        return advantages_of(batch, rewards, AlgorithmConfig(**options))

    got = of(process_coef=0.5, outcome_coef=2.0, whiten_of="source")
    want = 0.5 * of(process_coef=1.0, outcome_coef=0.0) + 2.0 * of(process_coef=0.0)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "grpo"}, {"estimator": "reinforce"}, {"process_return": "min"}, {"process_return": "gae"},
        {"whiten_of": "source"}, {"estimator": "grpo", "process_return": "gae", "whiten": False},
    ],
    ids=str,
)  # fmt: skip
def test_the_order_of_groups_and_the_scale_of_rewards_do_not_matter(options):
    cfg, order = AlgorithmConfig(**options), (2, 0, 3, 1)
    first, second = batch_of(), batch_of(order)
    rewards = rewards_of(first, masked=True, scale=10.0)
    starts = first.cu_seqlens[first.cu_groups].tolist()
    moved = torch.cat([torch.arange(starts[g], starts[g + 1]) for g in order])
    other = Rewards(0.25 * rewards.values[moved], rewards.mask[moved].nonzero().squeeze(1))
    torch.testing.assert_close(
        advantages_of(first, rewards, cfg)[moved], advantages_of(second, other, cfg), atol=5e-5, rtol=5e-5
    )


def test_min_blames_a_bad_step_and_what_led_to_it_alone():
    batch = Batch([Group([5], [Response([3, 4, 5, 6], 1.0), Response([3], 0.0)])])
    rewards = Rewards(torch.tensor([0.5, -1.0, 0.5, 0.25, 0.0]), None)
    cfg = AlgorithmConfig(process_return="min", outcome_coef=0.0, whiten=False, normalize_process=False)
    assert advantages_of(batch, rewards, cfg).tolist() == [-1.0, -1.0, 0.25, 0.25, 1.0]


def test_what_has_no_meaning_together_is_refused():
    with pytest.raises(
        ValidationError, match=r"algorithm\.gamma_process must be 1 with process_return = 'min', got 0\.9"
    ):
        AlgorithmConfig(process_return="min", gamma_process=0.9)
    with pytest.raises(ValidationError, match=r"algorithm\.process_baseline = 'paper' is a baseline of .* got 'gae'"):
        AlgorithmConfig(process_return="gae", process_baseline="paper")
