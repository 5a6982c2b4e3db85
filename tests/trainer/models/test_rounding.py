"""Rounding of merged weights: right on average, and the same in every call."""

import pytest
import torch

from prime_trainer.models.adapters import rounding
from prime_trainer.models.adapters.rounding import rounded

HALF = [torch.bfloat16, torch.float16]


def neighbours(exact, dtype):
    """The numbers of `dtype` at and next to `exact`, below and above."""
    near = exact.to(dtype)
    up = torch.nextafter(near, torch.full_like(near, torch.inf))
    down = torch.nextafter(near, torch.full_like(near, -torch.inf))
    return near.where(near <= exact, down), near.where(near >= exact, up)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_each_is_a_neighbour_and_the_mean_is_exact(dtype):
    """Of an update of a fiftieth of a unit in the last place, which rounding to nearest loses whole."""
    weight = torch.randn(300, 500).to(dtype).float()
    weight = weight.where(weight.abs() > 2**-6, 1.0)
    update = weight.abs() * torch.finfo(dtype).eps / 50
    exact = weight + update
    low, high = neighbours(exact, dtype)
    got = rounded(exact.clone(), dtype)
    assert got.dtype == dtype and ((got == low) | (got == high)).all()
    assert torch.equal(exact.to(dtype).float(), weight)
    kept = ((got.double() - weight) / update).mean()
    # A fiftieth to a hundredth of the weights move, by fifty to a hundred times the update: 150,000 of them.
    assert abs(kept - 1) < 5 * 10 / 150_000**0.5


def test_a_sum_over_a_row_has_the_update():
    """Of one direction of 500 small changes, as an adapter makes, nearest loses two thirds."""
    weight, direction = torch.randn(64, 500).bfloat16().float(), torch.randn(500)
    update = 3e-4 * torch.outer(torch.randn(64), direction)
    exact = weight + update
    ways = (rounded(exact.clone(), torch.bfloat16), exact.bfloat16())
    lost, lost_by_nearest = (((way.float() - exact) @ direction).norm() / (update @ direction).norm() for way in ways)
    assert lost < 0.25 and lost_by_nearest > 0.6


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_what_has_a_place_stays(dtype):
    """Zeros with their sign, the largest and the smallest, infinities and NaN."""
    info = torch.finfo(dtype)
    values = torch.tensor([[0.0, -0.0, 1.0, -3.5, info.max, info.min, info.tiny, torch.inf, -torch.inf, torch.nan]])
    got = rounded(values.repeat(50, 1), dtype)
    torch.testing.assert_close(got.float(), values.repeat(50, 1), rtol=0, atol=0, equal_nan=True)
    assert bool(torch.signbit(got[:, 1]).all()) and not torch.signbit(got[:, 0]).any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_same_in_every_call_and_chunk(monkeypatch, dtype):
    exact = torch.randn(37, 11)
    torch.manual_seed(1)
    whole = rounded(exact.clone(), dtype)
    monkeypatch.setattr(rounding, "CHUNK", 30)
    assert torch.equal(rounded(exact.clone(), dtype), whole)
    assert not torch.equal(whole, exact.to(dtype))
