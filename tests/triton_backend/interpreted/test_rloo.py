"""Returns and whitening by themselves, against the formulas in float64: all options, shares, launches in parts."""

import math

import pytest
import torch
from helpers.support import assert_close, offsets

from prime_kernels._backends import RlooBatch, RlooSettings
from prime_kernels._triton import rloo as kernels
from prime_kernels.ops import rloo_advantages

LENGTHS = [0, 3, 0, 17, 1, 1, 30, 0, 9, 6]
GROUPS = [1, 0, 4, 5]
TOTAL = sum(LENGTHS)
OPTIONS = {
    "gamma_process": 1.0,
    "gamma_outcome": 1.0,
    "process_coef": 5.0,
    "outcome_coef": 1.3,
    "normalize_process": True,
    "process_baseline": "reference",
}
VARIANTS = {
    "as it is": {},
    "discounts": {"gamma_process": 0.95, "gamma_outcome": 0.9},
    "no discount of outcomes": {"gamma_process": 0.5},
    "gamma 0": {"gamma_process": 0.0, "gamma_outcome": 0.0},
    "paper": {"process_baseline": "paper", "gamma_process": 0.95},
    "not normalised": {"normalize_process": False},
    "paper, not normalised": {"process_baseline": "paper", "normalize_process": False},
    "no outcomes": {"outcome_coef": 0.0, "process_coef": -1.0},
}


def inputs(masked=False):
    """(process rewards, mask, outcomes); what is masked is NaN."""
    rewards, mask = torch.randn(TOTAL), torch.rand(TOTAL) < 0.7 if masked else None
    # A response that carries nothing counts in no baseline.
    if masked:
        mask[3:20] = False
        rewards[~mask] = math.nan
    return rewards, mask, torch.rand(len(LENGTHS), dtype=torch.float64)


def truth(rewards, mask, outcomes, lengths=LENGTHS, groups=GROUPS, **options):
    rewards = None if rewards is None else rewards.double().nan_to_num(0.0)
    batch = RlooBatch(rewards, mask, outcomes, offsets(lengths), offsets(groups), sum(lengths))
    return rloo_advantages.reference(batch, RlooSettings(**OPTIONS | options), whiten=True, process_group=None)


def run(rewards, mask, outcomes, config, lengths=LENGTHS, groups=GROUPS, over_ranks=None, **options):
    batch = RlooBatch(rewards, mask, outcomes, offsets(lengths), offsets(groups), sum(lengths))
    returns, stats = kernels.rloo_returns(batch, RlooSettings(**OPTIONS | options), over_ranks, config)
    return returns, stats, kernels.whiten(returns, stats, config)


def check(got, want):
    returns, stats, advantages = got
    assert returns.dtype == advantages.dtype == torch.float32
    assert_close("golden", returns, want.returns)
    assert_close("golden", advantages, want.advantages)
    assert stats[:, 0].sum() == returns.numel()
    # The mean, and the squares about it, of each program's share.
    parts = returns.double().flip(0).split([int(count) for count in stats[:, 0]]) if returns.numel() else ()
    for (_, mean, squares), part in zip(stats.tolist(), parts, strict=False):
        assert_close("float64", part.mean(), mean)
        assert_close("float64", (part - part.mean()).square().sum(), squares)


@pytest.mark.parametrize("masked", [False, True], ids=["all carried", "masked"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_options(options, masked, cut):
    given = inputs(masked)
    check(run(*given, cut(TOTAL), **options), truth(*given, **options))


def test_outcomes_alone(cut):
    outcomes = torch.rand(len(LENGTHS), dtype=torch.float64)
    for gamma in (1.0, 0.9):
        options = {"gamma_outcome": gamma}
        check(run(None, None, outcomes, cut(TOTAL), **options), truth(None, None, outcomes, **options))


@pytest.mark.parametrize("lengths, groups", [([60], [1]), ([1] * 9, [9]), ([1], [1]), ([2, 0, 40], [1, 1, 1])])
def test_extremes(lengths, groups, cut):
    rewards, outcomes = torch.randn(sum(lengths)), torch.rand(len(lengths), dtype=torch.float64)
    options = {"gamma_process": 0.95, "lengths": lengths, "groups": groups}
    check(run(rewards, None, outcomes, cut(sum(lengths)), **options), truth(rewards, None, outcomes, **options))


def test_more_responses_than_a_block():
    lengths, groups = [index % 3 for index in range(300)], [7] * 42 + [6]
    rewards, outcomes = torch.randn(sum(lengths)), torch.rand(300, dtype=torch.float64)
    sizes = {"lengths": lengths, "groups": groups}
    check(run(rewards, None, outcomes, None, **sizes), truth(rewards, None, outcomes, **sizes))


def test_normalised_over_ranks(cut):
    """The largest suffix sum is handed out between two launches; another rank's is larger."""
    rewards, _, outcomes = inputs()
    seen = []

    def over_ranks(largest):
        assert largest.shape == () and largest.dtype == torch.float64
        seen.append(float(largest))
        largest.mul_(2.0)

    got = run(rewards, None, outcomes, cut(TOTAL), over_ranks=over_ranks)
    suffix = [part.flip(0).cumsum(0).abs().max() for part in rewards.double().split(LENGTHS) if part.numel()]
    assert seen == pytest.approx([float(max(suffix))], rel=1e-12)
    rewards = rewards / 2 / (seen[0] + 0.5e-6)
    check(got, truth(rewards, None, outcomes, normalize_process=False))
    assert run(None, None, outcomes, cut(TOTAL), over_ranks=over_ranks)[0].shape == (TOTAL,)
    run(rewards, None, outcomes, cut(TOTAL), over_ranks=over_ranks, normalize_process=False)
    assert len(seen) == 1


def test_without_tokens():
    """Other ranks may have some, and wait for this one."""
    seen = []
    outcomes = torch.rand(2, dtype=torch.float64)
    returns, stats, advantages = run(
        torch.empty(0), None, outcomes, None, lengths=[0, 0], groups=[2], over_ranks=lambda x: seen.append(float(x))
    )
    assert returns.shape == advantages.shape == (0,) and seen == [0.0]
    assert stats.tolist() == [[0.0, 0.0, 0.0]]


def test_nan_stays_in_its_group(cut):
    rewards, _, outcomes = inputs()
    want = run(rewards, None, outcomes, cut(TOTAL), normalize_process=False)[0]
    rewards[-1] = math.nan
    got = run(rewards, None, outcomes, cut(TOTAL), normalize_process=False)[0]
    of_others = sum(LENGTHS[:5])
    assert torch.equal(got[:of_others], want[:of_others]) and got[of_others:].isnan().any()


def test_bits_do_not_change(cut):
    given = inputs(masked=True)
    first, second = (run(*given, cut(TOTAL), gamma_process=0.95) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_whitening_joins_rows(cut):
    """Far more rows than are joined at once, with empty ones among them; values far from zero keep their variance."""
    values = (torch.randn(700) * 1e-2 + 100.0).float()
    parts = [*values.double().split(2), torch.empty(0, dtype=torch.float64)]
    rows = [[part.numel(), part.sum() / max(part.numel(), 1), 0.0] for part in parts]
    for row, part in zip(rows, parts, strict=True):
        row[2] = (part - row[1]).square().sum()
    got = kernels.whiten(values, torch.tensor(rows, dtype=torch.float64), cut(700))
    exact = values.double()
    assert_close("golden", got, (exact - exact.mean()) * (exact.var() + 1e-8).rsqrt())


def test_whitening_of_one_token_and_of_equal_ones():
    one = torch.tensor([3.7])
    assert kernels.whiten(one, torch.tensor([[1.0, 3.7, 0.0]], dtype=torch.float64)).tolist() == pytest.approx(
        [0.0], abs=2e-3
    )
    equal, outcomes = torch.zeros(4), torch.ones(2, dtype=torch.float64)
    got = run(equal, None, outcomes, None, lengths=[2, 2], groups=[2])
    assert got[2].tolist() == [0.0] * 4
