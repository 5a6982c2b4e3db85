"""Batches for RLOO, and what the kernels that check their values must find wrong."""

import math

import torch

from helpers.support import offsets
from prime_kernels._backends import RlooBatch

LENGTHS, GROUPS = [3, 0, 1500, 700], [1, 3]


def batch(rewards=torch.float32, outcomes=torch.float64, integers=torch.int64, masked=False, process=True):
    """Four responses, one of them empty, in two groups."""
    total = sum(LENGTHS)
    values = torch.randn(total).to(rewards) if process else None
    mask = torch.arange(total) % 3 != 1 if masked else None
    return RlooBatch(
        values,
        mask,
        torch.rand(len(LENGTHS)).to(outcomes),
        offsets(LENGTHS, integers),
        offsets(GROUPS, integers),
        total if process else 0,
    )


def changed(name, at, value):
    """A batch with one value replaced."""
    given = batch()
    getattr(given, name)[at] = value
    return given


WRONG = [
    ("cu_seqlens", 0, 1, "cu_seqlens: expected to start at 0"),
    ("cu_seqlens", 2, 2, "cu_seqlens: expected non-decreasing offsets"),
    ("cu_seqlens", 4, 2000, "cu_seqlens: expected to end at the number of tokens"),
    ("cu_groups", 0, 1, "cu_groups: expected to start at 0"),
    ("cu_groups", 1, 9, "cu_groups: expected non-decreasing offsets"),
    ("cu_groups", 2, 3, "cu_groups: expected to end at the number of responses"),
    ("outcomes", 3, math.nan, "outcomes: expected finite values"),
    ("process_rewards", -1, math.inf, "process_rewards: expected finite values"),
    ("process_rewards", 0, math.nan, "process_rewards: expected finite values"),
]
