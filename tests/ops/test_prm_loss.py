"""prm_loss against plain loops."""

import math

import pytest
import torch
from helpers.support import assert_close, groups, offsets, seeds, split, uniform
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk
from prime_kernels._constants import PRM_KINDS


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def loop_loss(delta, outcomes, lengths, sizes, kind, beta, weights, shift):
    """(loss, d loss / d delta)."""
    some = [i for i in range(len(delta)) if lengths[i] > 0]
    terms, gradient = [], [0.0] * len(delta)
    if kind == "ce":
        for i in some:
            x = beta * delta[i] + shift[i]
            terms.append(weights[i] * (outcomes[i] * softplus(-x) + (1 - outcomes[i]) * softplus(x)))
            gradient[i] += weights[i] * beta * (sigmoid(x) - outcomes[i])
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


def prefix_loop(rows, outcomes, beta, margin, weights, shift):
    """(loss, d loss / d log-ratio of each token of each response), from the sums of each prefix anew."""
    count = max(sum(1 for row in rows if row), 1)
    losses, gradients = [], []
    for row, right, weight, moved in zip(rows, outcomes, weights, shift, strict=True):
        gradient = [0.0] * len(row)
        for t in range(1, len(row) + 1):
            value = beta * math.fsum(row[:t]) / t + moved
            share = weight / (len(row) * count)
            losses.append(share * (right * softplus(margin - value) + (1 - right) * softplus(margin + value)))
            slope = (1 - right) * sigmoid(margin + value) - right * sigmoid(margin - value)
            for u in range(t):
                gradient[u] += share * slope * beta / t
        gradients.append(gradient)
    return math.fsum(losses), gradients


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
    kind=st.sampled_from(PRM_KINDS),
    beta=st.sampled_from([0.05, 1.0, 20.0]),
    margin=st.sampled_from([0.0, 0.3, 5.0]),
    scale=st.sampled_from([1e-3, 1.0, 100.0]),
    soft=st.booleans(),
    weighted=st.booleans(),
    shifted=st.booleans(),
    precise=st.booleans(),
    seed=seeds,
)
def test_matches_loop(batch, kind, beta, margin, scale, soft, weighted, shifted, precise, seed):
    """float64 is the reference's; float32 goes to the kernels where a backend has them."""
    lengths, sizes = batch
    ratios = torch.tensor(uniform(sum(lengths), seed, -scale, scale), dtype=torch.float64 if precise else torch.float32)
    ratios.requires_grad_()
    outcomes = uniform(len(lengths), seed + 1, 0, 1)
    outcomes = outcomes if soft else [float(round(a)) for a in outcomes]
    weights, shift = uniform(len(lengths), seed + 2, 0, 2), uniform(len(lengths), seed + 3, -3, 3)
    weighted, shifted = weighted and kind in ("ce", "prefix"), shifted and kind in ("ce", "prefix")
    result = pk.prm_loss(
        ratios,
        torch.tensor(outcomes, dtype=torch.float64),
        offsets(lengths),
        cu_groups=offsets(sizes, torch.int32),
        kind=kind,
        beta=beta,
        margin=margin,
        weights=torch.tensor(weights, dtype=torch.float64) if weighted else None,
        shift=torch.tensor(shift, dtype=torch.float64) if shifted else None,
    )
    weights, shift = weights if weighted else [1.0] * len(lengths), shift if shifted else [0.0] * len(lengths)
    rows = split(ratios.tolist(), lengths)
    scores = [math.fsum(row) for row in rows]
    if kind == "prefix":
        loss, gradients = prefix_loop(rows, outcomes, beta, margin, weights, shift)
        gradient = [each for row in gradients for each in row]
        scores = [total / max(len(row), 1) for total, row in zip(scores, rows, strict=True)]
    else:
        loss, slopes = loop_loss(scores, outcomes, lengths, sizes, kind, beta, weights, shift)
        gradient = [slopes[i] for i, length in enumerate(lengths) for _ in range(length)]
    assert_close("float64" if precise else "golden", result.loss, loss)
    assert_close(
        "float64" if precise else "golden", result.pair_accuracy, loop_accuracy(scores, outcomes, lengths, sizes)
    )
    (3.0 * result.loss).backward()
    assert_close("float64" if precise else "grad.float32", ratios.grad, [3.0 * each for each in gradient])


def test_prefix_by_hand():
    """Two prefixes of a right response: beta * 1 - 1 = 1 and beta * 0.5 - 1 = 0."""
    result = pk.prm_loss(
        torch.tensor([1.0, 0.0]), torch.tensor([1.0]), offsets([2]), kind="prefix", beta=2.0, margin=1.0
    )
    assert float(result.loss) == pytest.approx((math.log1p(math.exp(-1.0)) + math.log(2.0)) / 2, rel=1e-6)


def test_default_beta_is_that_of_the_kind():
    q, outcomes, cu = torch.randn(5), torch.tensor([1.0, 0.0]), offsets([2, 3])
    for kind, beta in (("ce", 0.05), ("prefix", 10.0)):
        assert pk.prm_loss(q, outcomes, cu, kind=kind).loss == pk.prm_loss(q, outcomes, cu, kind=kind, beta=beta).loss
    given = pk.prm_loss(q, outcomes, cu, kind="prefix", beta=10.0, margin=5.0)
    assert pk.prm_loss(q, outcomes, cu, kind="prefix").loss == given.loss


def test_weights_that_make_prefix_the_mean_over_all_tokens():
    """By "ce" with a shift, token by token."""
    rows, outcomes, margin = [torch.randn(2), torch.randn(0), torch.randn(7)], [1.0, 0.0, 0.0], 0.5
    lengths = torch.tensor([row.numel() for row in rows])
    weights = lengths * ((lengths > 0).sum() / lengths.sum())
    columns = (torch.cat(rows), torch.tensor(outcomes), offsets(lengths.tolist()))
    result = pk.prm_loss(*columns, kind="prefix", beta=1.0, margin=margin, weights=weights)
    tokens = []
    for row, outcome in zip(rows, outcomes, strict=True):
        shift = torch.tensor([-margin if outcome else margin])
        for t in range(1, row.numel() + 1):
            of_token = (row[:t], torch.tensor([outcome]), offsets([t]))
            tokens.append(pk.prm_loss(*of_token, beta=1.0 / t, shift=shift).loss)
    assert_close("golden", result.loss, torch.stack(tokens).mean())


@pytest.mark.parametrize("kind", PRM_KINDS)
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


@pytest.mark.parametrize("kind", PRM_KINDS)
def test_extreme_ratios_stay_finite(kind):
    ratios = torch.tensor([3e38, -3e38, -3e38, 3e38], requires_grad=True)
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.0])
    result = pk.prm_loss(ratios, outcomes, offsets([1] * 4), cu_groups=offsets([4]), kind=kind, beta=0.05)
    result.loss.backward()
    assert ratios.grad.isfinite().all() and result.loss.isfinite()


def test_sure_prefixes_keep_the_tails_of_their_losses():
    """softplus of -80 and of 800: neither 0 nor infinite."""
    q, outcomes = torch.tensor([80.0, -800.0, 80.0, -800.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    for i, expected in enumerate([math.exp(-80.0), 800.0, 80.0, 0.0]):
        x = q[i : i + 1].clone().requires_grad_()
        loss = pk.prm_loss(x, outcomes[i : i + 1], offsets([1]), kind="prefix", beta=1.0, margin=0.0).loss
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6, abs=0.0)
        assert float(x.grad) == pytest.approx([-math.exp(-80.0), -1.0, 1.0, 0.0][i], rel=1e-6, abs=0.0)


def test_nan_stays_in_its_response():
    x = torch.zeros(9)
    x[4] = math.nan
    x.requires_grad_()
    loss = pk.prm_loss(x, torch.tensor([1.0, 0.0, 1.0]), offsets([3, 3, 3]), kind="prefix").loss
    loss.backward()
    assert loss.isnan() and x.grad.isnan().tolist() == [False] * 3 + [True] * 3 + [False] * 3


@pytest.mark.parametrize("kind", PRM_KINDS)
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
