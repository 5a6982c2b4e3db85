"""prm_loss against plain loops."""

import math

import pytest
import torch
from helpers.support import assert_close, groups, offsets, seeds, split, uniform
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def loop_loss(delta, outcomes, lengths, sizes, kind, beta):
    """(loss, d loss / d delta)."""
    some = [i for i in range(len(delta)) if lengths[i] > 0]
    terms, gradient = [], [0.0] * len(delta)
    if kind == "ce":
        for i in some:
            x = beta * delta[i]
            terms.append(outcomes[i] * softplus(-x) + (1 - outcomes[i]) * softplus(x))
            gradient[i] += beta * (sigmoid(x) - outcomes[i])
    elif kind == "kto":
        kl = max(0.0, math.fsum(delta[i] for i in some) / len(some)) if some else 0.0
        for i in some:
            sign = 1 if outcomes[i] > 0.5 else -1
            share = sigmoid(sign * beta * (delta[i] - kl))
            terms.append(1 - share)
            gradient[i] -= sign * beta * share * (1 - share)
    else:
        start = 0
        for size in sizes:
            members = [i for i in range(start, start + size) if lengths[i] > 0]
            start += size
            for won in members:
                for lost in members:
                    if not outcomes[won] > 0.5 or outcomes[lost] > 0.5:
                        continue
                    if kind == "dpo":
                        margin = beta * (delta[won] - delta[lost])
                        terms.append(softplus(-margin))
                        gradient[won] -= beta * sigmoid(-margin)
                        gradient[lost] += beta * sigmoid(-margin)
                    else:
                        x, y = beta * delta[won], beta * delta[lost]
                        terms.append(softplus(-x) + 0.5 * softplus(x) + 0.5 * softplus(y))
                        gradient[won] += beta * (0.5 * sigmoid(x) - sigmoid(-x))
                        gradient[lost] += beta * 0.5 * sigmoid(y)
    count = max(len(terms), 1)
    return math.fsum(terms) / count, [g / count for g in gradient]


def loop_accuracy(scores, outcomes, lengths, sizes):
    shares, start = [], 0
    for size in sizes:
        members, right, weight = [i for i in range(start, start + size) if lengths[i] > 0], 0.0, 0.0
        start += size
        for a in range(len(members)):
            for b in range(a + 1, len(members)):
                i, j = members[a], members[b]
                gap = abs(outcomes[i] - outcomes[j])
                right += gap * ((scores[i] > scores[j]) == (outcomes[i] > outcomes[j]))
                weight += gap
        shares.append(right / weight if weight else 0.5)
    return sum(shares) / len(shares)


@given(
    batch=groups(),
    kind=st.sampled_from(["ce", "dpo", "kto", "nca"]),
    beta=st.sampled_from([0.05, 1.0, 20.0]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    soft=st.booleans(),
    seed=seeds,
)
def test_matches_loop(batch, kind, beta, scale, soft, seed):
    lengths, sizes = batch
    ratios = torch.tensor(uniform(sum(lengths), seed, -scale, scale), dtype=torch.float64).requires_grad_()
    outcomes = uniform(len(lengths), seed + 1, 0, 1)
    outcomes = outcomes if soft else [float(round(a)) for a in outcomes]
    result = pk.prm_loss(
        ratios,
        torch.tensor(outcomes, dtype=torch.float64),
        offsets(lengths),
        cu_groups=offsets(sizes, torch.int32),
        kind=kind,
        beta=beta,
    )
    delta = [math.fsum(row) for row in split(ratios.tolist(), lengths)]
    loss, gradient = loop_loss(delta, outcomes, lengths, sizes, kind, beta)
    assert_close("float64", result.loss, loss)
    assert_close("float64", result.pair_accuracy, loop_accuracy(delta, outcomes, lengths, sizes))
    (3.0 * result.loss).backward()
    expected = [3.0 * gradient[i] for i, length in enumerate(lengths) for _ in range(length)]
    assert_close("float64", ratios.grad, expected)


@pytest.mark.parametrize("kind", ["ce", "dpo", "kto", "nca"])
def test_nothing_to_learn_from_gives_zero_with_a_graph(kind):
    for lengths, sizes in (([], []), ([0, 0], [2])):
        ratios = torch.zeros(0, requires_grad=True)
        result = pk.prm_loss(ratios, torch.ones(len(lengths)), offsets(lengths), cu_groups=offsets(sizes), kind=kind)
        result.loss.backward()
        assert result.loss == 0.0 and result.pair_accuracy == 0.5 and ratios.grad.shape == (0,)


@pytest.mark.parametrize("kind", ["dpo", "nca"])
def test_uniform_groups_have_no_pairs(kind):
    ratios = torch.randn(4, requires_grad=True)
    outcomes, cu = torch.tensor([1.0, 1.0, 0.0, 0.0]), offsets([1, 1, 1, 1])
    result = pk.prm_loss(ratios, outcomes, cu, cu_groups=offsets([2, 2]), kind=kind)
    result.loss.backward()
    assert result.loss == 0.0 and result.pair_accuracy == 0.5 and not ratios.grad.any()


def test_pair_accuracy_without_groups_is_nan():
    assert pk.prm_loss(torch.randn(3), torch.tensor([1.0]), offsets([3])).pair_accuracy.isnan()


@pytest.mark.parametrize("kind", ["ce", "dpo", "kto", "nca"])
def test_extreme_ratios_stay_finite(kind):
    ratios = torch.tensor([3e38, -3e38, -3e38, 3e38], requires_grad=True)
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.0])
    result = pk.prm_loss(ratios, outcomes, offsets([1] * 4), cu_groups=offsets([4]), kind=kind, beta=0.05)
    result.loss.backward()
    assert ratios.grad.isfinite().all() and result.loss.isfinite()


@pytest.mark.parametrize("kind", ["ce", "dpo", "kto", "nca"])
def test_gradcheck(kind):
    ratios = torch.randn(7, dtype=torch.float64, requires_grad=True)
    outcomes, cu, cu_groups = torch.tensor([1.0, 0.0, 0.3, 0.9]), offsets([2, 3, 1, 1]), offsets([3, 1])
    if kind == "kto":  # Its KL is a constant for the gradient; below zero it is one in value, too.
        ratios = (-ratios.detach().abs()).requires_grad_()

    def run(x):
        return pk.prm_loss(x, outcomes, cu, cu_groups=cu_groups, kind=kind, beta=0.7).loss

    assert torch.autograd.gradcheck(run, (ratios,))


def test_results_are_float32_scalars():
    result = pk.prm_loss(torch.randn(3).bfloat16(), torch.tensor([1.0]), offsets([3]), cu_groups=offsets([1]))
    assert all(x.dtype == torch.float32 and x.shape == () for x in result)
