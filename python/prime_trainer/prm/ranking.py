"""How well scores order right and wrong responses."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
