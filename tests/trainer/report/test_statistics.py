import itertools
import math

import numpy as np
import pytest

from prime_trainer.report.statistics import bootstrap_interval, majority, pass_at_k, t_interval, wilson


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 4), (5, 5, 1), (6, 3, 4), (4, 1, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n, correct, k):
    right = [i < correct for i in range(n)]
    subsets = list(itertools.combinations(right, k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 0), (5, 2, 6), (5, 6, 1), (5, -1, 1)])
def test_pass_at_k_names_what_is_out_of_range(n, correct, k):
    with pytest.raises(ValueError, match=f"got k = {k}, n = {n}, correct = {correct}"):
        pass_at_k(n, correct, k)


@pytest.mark.parametrize(
    ("groups", "weights", "index"),
    [
        (["a", "b", "b"], None, 1),
        (["a", "b", "b", "a"], None, 0),
        ([None, "b", None, None], None, 1),
        ([None, None], None, None),
        ([], None, None),
        (["a", "b", "b"], [0.9, 0.3, 0.4], 0),
        (["a", "b", "b"], [0.6, 0.3, 0.4], 1),
        ([0, 1, 1], None, 1),
    ],
)
def test_majority(groups, weights, index):
    assert majority(groups, weights) == index


@pytest.mark.parametrize(
    ("share", "count", "interval"),
    [(0.5, 100, (0.4038, 0.5962)), (0.0, 10, (0.0, 0.2775)), (1.0, 10, (0.7225, 1.0)), (0.9, 200, (0.8506, 0.9344))],
)
def test_wilson(share, count, interval):
    assert wilson(share, count) == pytest.approx(interval, abs=1e-4)


def test_bootstrap_interval_is_the_binomial_one_for_a_share_and_repeats():
    values = [1.0] * 30 + [0.0] * 70
    low, high = bootstrap_interval(values, resamples=20000)
    half = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.011)  # quantiles are hundredths
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([0.5] * 7) == (0.5, 0.5)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_bootstrap_interval_takes_rows_and_a_statistic():
    rows = [(1.0, 0.0), (1.0, 1.0), (0.0, 0.0)]
    best = bootstrap_interval(rows, lambda drawn: drawn.max(axis=2).mean(axis=1), seed=1)
    assert best == bootstrap_interval([1.0, 1.0, 0.0], seed=1)
    assert np.isfinite(best).all() and best[0] < best[1]


@pytest.mark.parametrize(
    ("count", "point"), [(2, 12.7062), (3, 4.3027), (6, 2.5706), (31, 2.0423), (32, 2.0395), (101, 1.9840)]
)
def test_t_interval_has_students_points(count, point):
    values = [1.0] * (count - 1) + [1.0 + count]  # mean 2, unbiased variance `count`: the standard error is 1
    mean, low, high = t_interval(values)
    assert mean == pytest.approx(2.0)
    assert (mean - low, high - mean) == pytest.approx((point, point), rel=2e-3)


def test_one_value_has_no_interval():
    mean, low, high = t_interval([0.25])
    assert mean == 0.25 and math.isnan(low) and math.isnan(high)
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])
