"""Sums, means and indices of packed segments in plain PyTorch, for references and kernels."""

import torch
from torch import Tensor


def segment_index(offsets: Tensor, total: int) -> Tensor:
    """The segment of each element, [total] int64, from checked offsets [S + 1]. Never waits for the device."""
    segments = torch.arange(offsets.numel() - 1, dtype=torch.int64, device=offsets.device)
    return torch.repeat_interleave(segments, offsets.diff(), output_size=total)


def indexed_total(values: Tensor, index: Tensor, segments: int) -> Tensor:
    """The sum of the values of each segment, [segments] float64: long sums keep the digits of their float32 terms."""
    total = torch.zeros(segments, dtype=torch.float64, device=values.device)
    return total.index_add(0, index, values.double())


def segment_total(values: Tensor, offsets: Tensor) -> Tensor:
    """The sum of each segment of packed values, [S] float64, from checked offsets [S + 1]."""
    return indexed_total(values, segment_index(offsets, values.numel()), offsets.numel() - 1)


def result_dtype(values: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def leave_one_out(values: Tensor, counted: Tensor, cu_groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each response, the mean over the other counted responses of its group and their number, float64.

    Without others the mean is 0: a group of one has baseline 0.
    """
    group, groups = segment_index(cu_groups, values.numel()), cu_groups.numel() - 1
    values = values.where(counted, 0.0)
    others = (indexed_total(counted, group, groups)[group] - counted.double()).clamp(min=0.0)
    return (indexed_total(values, group, groups)[group] - values) / others.clamp(min=1.0), others


def ordered_pairs(cu_groups: Tensor, responses: int) -> tuple[Tensor, Tensor]:
    """Indices (i, j) of every ordered pair of responses that share a group, i = j included."""
    sizes = cu_groups.diff()
    group = segment_index(cu_groups, responses)
    partners = sizes[group]
    first = torch.repeat_interleave(partners)
    # The partner's index in the group: the position of the pair minus that of the first pair of i.
    rank = torch.arange(first.numel(), dtype=torch.int64, device=first.device) - (partners.cumsum(0) - partners)[first]
    return first, cu_groups[:-1][group][first] + rank


def pair_accuracy(scores: Tensor, outcomes: Tensor, counted: Tensor, cu_groups: Tensor) -> Tensor:
    """Mean over groups of the fraction of pairs i < j in the order of their outcomes, weighted by |a_i - a_j|.

    A group without a pair of different outcomes counts 0.5, and so does a batch without groups.
    """
    groups, responses = cu_groups.numel() - 1, scores.numel()
    first, second = ordered_pairs(cu_groups, responses)
    gap = (outcomes[first] - outcomes[second]).abs()
    gap = gap.where((first < second) & counted[first] & counted[second], 0.0)
    agrees = (scores[first] > scores[second]) == (outcomes[first] > outcomes[second])
    group = segment_index(cu_groups, responses)[first]
    weight = indexed_total(gap, group, groups)
    share = indexed_total(gap * agrees, group, groups) / weight.where(weight > 0, 1.0)
    share = share.where(weight > 0, 0.5)
    return share.mean() if groups else torch.full((), 0.5, dtype=torch.float64, device=scores.device)


def merge_moments(moments: Tensor) -> Tensor:
    """[3] from [P, 3] float64: count, mean and sum of squares about the mean of a whole, from those of its parts.

    Without the cancellation of (sum of squares) - (square of the sum).
    """
    count, mean, squares = moments.unbind(1)
    total = count.sum()
    merged = (count * mean).sum() / total.clamp(min=1.0)
    return torch.stack((total, merged, squares.sum() + (count * (mean - merged).square()).sum()))
