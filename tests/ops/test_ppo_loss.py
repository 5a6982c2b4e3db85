"""ppo_loss against a plain loop."""

import math

import pytest
import torch
from helpers.support import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


def loop(logp, old, advantages, mask, weights, low, high, dual, denominator):
    """(loss, clip fraction, approximate KL, gradient) with the ratio held at e^20."""
    total, clips, kl, count, gradient = 0.0, 0, 0.0, 0, [0.0] * len(logp)
    for t in range(len(logp)):
        if not mask[t]:
            continue
        count += 1
        log_rho = logp[t] - old[t]
        rho = math.exp(min(log_rho, 20.0))
        free, clipped = -advantages[t] * rho, -advantages[t] * min(max(rho, 1 - low), 1 + high)
        loss, held = max(free, clipped), clipped > free
        if dual is not None and advantages[t] < 0 and loss > -advantages[t] * dual:
            loss, held = -advantages[t] * dual, True
        total += weights[t] * loss
        clips += held
        kl -= log_rho
        if not held and log_rho <= 20.0:
            gradient[t] = weights[t] * free
    count = max(count, 1)
    divisor = count if denominator is None else denominator
    return total / divisor, clips / count, kl / count, [g / divisor for g in gradient]


@given(
    count=st.integers(0, 12),
    spread=st.sampled_from([0.0, 0.3, 5.0]),
    low=st.sampled_from([0.0, 0.2, 1.0]),
    high=st.sampled_from([0.0, 0.28, 3.0]),
    dual=st.sampled_from([None, 1.1, 3.0]),
    masked=st.booleans(),
    weighted=st.booleans(),
    denominator=st.sampled_from([None, 7, 2.5]),
    as_tensor=st.booleans(),
    seed=seeds,
)
def test_matches_loop(count, spread, low, high, dual, masked, weighted, denominator, as_tensor, seed):
    torch.manual_seed(seed)
    logp = torch.randn(count, dtype=torch.float64).requires_grad_()
    old = logp.detach() + torch.randn(count, dtype=torch.float64) * spread
    advantages = torch.randn(count)
    mask = torch.rand(count) < 0.6 if masked else None
    weights = torch.rand(count) * 2 if weighted else None
    expected = loop(
        logp.tolist(),
        old.tolist(),
        advantages.tolist(),
        [True] * count if mask is None else mask.tolist(),
        [1.0] * count if weights is None else weights.tolist(),
        low,
        high,
        dual,
        denominator,
    )
    divisor = torch.tensor(denominator) if as_tensor and denominator is not None else denominator
    result = pk.ppo_loss(
        logp, old, advantages, mask=mask, weights=weights, clip_low=low, clip_high=high, dual_clip=dual,
        denominator=divisor,
    )  # fmt: skip
    for got, want in zip(result, expected, strict=False):
        assert_close("float64", got, want)
    (result.loss * 1.7).backward()
    assert_close("float64", logp.grad, [1.7 * g for g in expected[3]])


def test_dual_clip_by_hand():
    """Ratios of 4, 2 and 4 with a bound of 3: the first is held, the second is not, nor is a positive advantage."""
    logp = torch.tensor([4.0, 2.0, 4.0]).log().requires_grad_()
    old, advantages = torch.zeros(3), torch.tensor([-0.5, -0.5, 1.0])
    result = pk.ppo_loss(logp, old, advantages, clip_high=9.0, dual_clip=3.0, denominator=1)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(1.5 + 1.0 - 4.0)
    assert result.clip_fraction.item() == pytest.approx(1 / 3)
    assert logp.grad.tolist() == pytest.approx([0.0, 1.0, -4.0])
    # No bound, and one that no ratio reaches, are the same to the bit.
    free = pk.ppo_loss(logp.detach(), old, advantages, clip_high=9.0)
    assert free == pk.ppo_loss(logp.detach(), old, advantages, clip_high=9.0, dual_clip=1e9)
    assert free.loss.item() == pytest.approx((2.0 + 1.0 - 4.0) / 3)


def test_float32_agrees_with_float64():
    logp, old, advantages = torch.randn(3, 4000)
    result, truth = pk.ppo_loss(logp, old, advantages), pk.ppo_loss(logp.double(), old.double(), advantages)
    assert all(scalar.dtype == torch.float32 and scalar.shape == () for scalar in result)
    for got, want in zip(result, truth, strict=True):
        assert_close("sums", got, want)


def test_masked_positions_may_hold_anything():
    logp, old, advantages, weights = torch.randn(4, 6)
    mask = torch.tensor([True, False, True, False, False, True])
    clean = pk.ppo_loss(logp[mask], old[mask], advantages[mask], weights=weights[mask])
    for column, values in zip((logp, old, advantages, weights), (math.nan, math.inf, -math.inf, math.nan), strict=True):
        column[~mask] = values
    leaf = logp.clone().requires_grad_()
    result = pk.ppo_loss(leaf, old, advantages, weights=weights, mask=mask)
    result.loss.backward()
    assert [x.item() for x in result] == pytest.approx([x.item() for x in clean], rel=1e-6)
    assert not leaf.grad[~mask].any() and leaf.grad.isfinite().all()


def test_nothing_valid_gives_zero_with_a_graph():
    leaf = torch.full((3,), math.nan, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool)
    result = pk.ppo_loss(leaf, torch.zeros(3), torch.zeros(3), mask=mask)
    result.loss.backward()
    assert [x.item() for x in result] == [0.0, 0.0, 0.0] and leaf.grad.tolist() == [0.0] * 3
    empty = torch.zeros(0, requires_grad=True)
    pk.ppo_loss(empty, torch.zeros(0), torch.zeros(0)).loss.backward()
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("log_rho", [-1e4, -100.0, 89.0, 1e4])
def test_extreme_ratios_stay_finite(advantage, log_rho):
    leaf = torch.tensor([log_rho, 0.0], requires_grad=True)
    result = pk.ppo_loss(leaf, torch.zeros(2), torch.tensor([advantage, 1.0]))
    result.loss.backward()
    assert result.loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[1] == -0.5


def test_only_logp_gets_a_gradient():
    logp, old, advantages, weights = (torch.randn(4, requires_grad=True) for _ in range(4))
    pk.ppo_loss(logp, old, advantages, weights=weights).loss.backward()
    assert logp.grad is not None and old.grad is advantages.grad is weights.grad is None


def test_micro_batches_add_up_with_a_global_denominator():
    logp, old, advantages = torch.randn(3, 10)
    whole = pk.ppo_loss(logp, old, advantages).loss
    parts = [pk.ppo_loss(logp[s], old[s], advantages[s], denominator=10).loss for s in (slice(0, 3), slice(3, 10))]
    assert_close("sums", sum(parts), whole)


def test_gradcheck():
    logp = torch.tensor([-0.5, -1.0, -0.9, -3.0], dtype=torch.float64, requires_grad=True)
    old, advantages = torch.tensor([-0.6, -0.5, -2.0, -2.9]), torch.tensor([1.0, -1.0, 2.0, -0.5])
    assert torch.autograd.gradcheck(lambda x: pk.ppo_loss(x, old, advantages).loss, (logp,))
