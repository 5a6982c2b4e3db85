"""Accuracy from several responses a problem, with intervals; the area under the ROC curve."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

_Z = 1.959964  # the 97.5 % point of the normal distribution


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Returns the unbiased estimate of P(one of k responses is right) from n responses, `correct` of them right.

    `1 - C(n - correct, k) / C(n, k)` (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError unless
    `1 <= k <= n` and `0 <= correct <= n`.
    """
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@k needs 1 <= k <= n and 0 <= correct <= n, got k = {k}, n = {n}, correct = {correct}")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(groups: Sequence[Hashable | None], weights: Sequence[float] | None = None) -> int | None:
    """Returns the index of the first member of the heaviest group; None where nothing votes.

    `groups[i]` names the group of equivalent answers that response i is in, None where it has no answer and no vote.
    Every vote weighs one, or `weights[i]` (weighted best-of-N). Of equally heavy groups the one seen first wins.
    """
    votes: dict[Hashable, float] = {}
    first: dict[Hashable, int] = {}
    for i, group in enumerate(groups):
        if group is None:
            continue
        first.setdefault(group, i)
        votes[group] = votes.get(group, 0.0) + (1.0 if weights is None else weights[i])
    return first[max(votes, key=votes.__getitem__)] if votes else None


def wilson(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % Wilson interval of a share observed over `count` problems."""
    centre = (share + _Z * _Z / (2 * count)) / (1 + _Z * _Z / count)
    half = _Z / (1 + _Z * _Z / count) * math.sqrt(share * (1 - share) / count + _Z * _Z / (4 * count * count))
    # The bounds touch 0 and 1 exactly, which rounding would miss.
    return (0.0 if share == 0 else max(0.0, centre - half)), (1.0 if share == 1 else min(1.0, centre + half))


def bootstrap_interval(
    values: Sequence[float],
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the percentile bootstrap interval of a statistic of `values`, one value (or row of values) a problem.

    Problems are drawn with replacement, `resamples` times. `statistic` maps `[resamples, len(values), ...]` to
    `[resamples]`; without it, the mean. The same seed gives the same interval. Raises ValueError for no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("a bootstrap interval needs at least one value")
    drawn = np.random.default_rng(seed).integers(len(array), size=(resamples, len(array)))
    found = array[drawn].mean(axis=1) if statistic is None else statistic(array[drawn])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def auc(scores: Tensor, wanted: Tensor) -> float:
    """Area under the ROC curve: the chance that a wanted response scores above an unwanted one, ties a half.

    `scores` [B], `wanted` bool [B]; NaN where one of the classes is empty. Mann-Whitney's U over its largest value.
    """
    right, wrong = int(wanted.sum()), int((~wanted).sum())
    if not right or not wrong:
        return math.nan
    _, value, counts = torch.unique(scores.double(), return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    ranks = (last - (counts - 1) / 2)[value]  # from 1, equal scores share their mean
    return ((ranks[wanted].sum() - right * (right + 1) / 2) / (right * wrong)).item()


# 97.5 % points of Student's t with 1, 2, .. 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns (mean, low, high): the mean of `values` and its 95 % interval by Student's t, NaN for a single value.

    Raises ValueError for no values.
    """
    if not values:
        raise ValueError("an interval of the mean needs at least one value")
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, math.nan, math.nan
    free = count - 1
    # Beyond the table the first terms of the expansion in 1 / degrees of freedom, right to 0.2 %.
    point = _T[free - 1] if free <= len(_T) else _Z + (_Z**3 + _Z) / (4 * free)
    half = point * math.sqrt(sum((value - mean) ** 2 for value in values) / free / count)
    return mean, mean - half, mean + half
