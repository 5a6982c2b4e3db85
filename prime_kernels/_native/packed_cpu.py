"""Token passes on the C++ kernels of the CPU. packed_cuda.py and _triton/segments.py have the same functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_kernels._backends import PPOResults, PPOTokens, RlooBatch, RlooSettings
from prime_kernels._layout import column, mask_column
from prime_kernels._native import address, run
from prime_kernels._segment_math import leave_one_out, merge_moments

CPU = torch.device("cpu")
NORMALIZE_EPS, WHITEN_EPS = 1e-6, 1e-8


def segment_scan(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """y_t = x_t + gamma * y_{t-1} (y_{t+1} if ``reverse``) in each segment of values, float32 or float64."""
    values, cu_seqlens = values.contiguous(), offsets_column(cu_seqlens)
    assert values.dtype in (torch.float32, torch.float64)
    out = torch.empty_like(values)
    wide = values.dtype == torch.float64
    run("segment_scan", CPU, *_segments(values, cu_seqlens), gamma, wide, reverse, out.data_ptr())
    return out


def segment_sum(values: Tensor, cu_segments: Tensor) -> Tensor:
    """The sum of each segment of float32 values, [S] float64."""
    values, cu_segments = values_column(values), offsets_column(cu_segments)
    out = torch.empty(cu_segments.numel() - 1, dtype=torch.float64)
    run("segment_sum", CPU, *_segments(values, cu_segments), out.data_ptr())
    return out


def segment_fill(values: Tensor, cu_segments: Tensor, total: int, factor: Tensor | None = None) -> Tensor:
    """Each token's segment's value times ``factor``, [total] float32 from [S] float64."""
    if factor is not None:
        values = values * factor.double()
    values, cu_segments = column(values, torch.float64, cu_segments.numel() - 1, CPU), offsets_column(cu_segments)
    out = torch.empty(total, dtype=torch.float32)
    run("segment_fill", CPU, values.data_ptr(), cu_segments.data_ptr(), values.numel(), total, out.data_ptr())
    return out


def rloo_returns(
    batch: RlooBatch,
    settings: RlooSettings,
    over_ranks: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """(returns [T] float32, their (count, mean, sum of squares about it) [1, 3] float64)."""
    process_rewards, reward_mask, outcomes, cu_seqlens, cu_groups, total = batch
    cu_seqlens, responses = offsets_column(cu_seqlens), outcomes.numel()
    rewards, mask = 0, None
    centred = outcomes - leave_one_out(outcomes, cu_seqlens.diff() > 0, cu_groups)[0]
    scale = shift = torch.zeros_like(centred)
    if process_rewards is not None:
        process_rewards, mask = values_column(process_rewards), mask_column(reward_mask, total, CPU)
        rewards = process_rewards.data_ptr()
        sums, counts = torch.empty(2, responses, dtype=torch.float64)
        largest = torch.empty((), dtype=torch.float64)
        results = (each.data_ptr() for each in (sums, counts, largest))
        run("rloo_moments", CPU, rewards, address(mask), cu_seqlens.data_ptr(), responses, total, *results)
        unit = 1.0
        if settings.normalize_process:
            if over_ranks is not None:
                over_ranks(largest)
            unit = 1.0 / (float(largest) + NORMALIZE_EPS)
        scale, shift = _process_terms(
            sums * unit / counts.clamp(min=1.0), counts > 0, cu_groups, settings.process_baseline
        )
        scale = scale * unit
    columns = [column(each, torch.float64, responses, CPU) for each in (scale, shift, centred)]
    out = torch.empty(total, dtype=torch.float32)
    factors = settings[:4]
    addresses = (each.data_ptr() for each in columns)
    fields = (rewards, address(mask), cu_seqlens.data_ptr(), responses, total, *addresses, *factors, out.data_ptr())
    mean = run("rloo_returns", CPU, *fields) / max(total, 1)
    squares = run("centred_squares", CPU, out.data_ptr(), total, mean)
    return out, torch.tensor([[total, mean, squares]], dtype=torch.float64)


def _process_terms(means: Tensor, carrying: Tensor, cu_groups: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """(scale, shift) of each response: reward = s + (s - m_i) / (n - 1) - baseline, without the middle term for
    "paper", is linear in s."""
    others_mean, others = leave_one_out(means, carrying, cu_groups)
    share = torch.zeros_like(others)
    if baseline == "reference":
        share = (1.0 / others.clamp(min=1.0)).where(others > 0, 0.0)
    return 1.0 + share, -share * means - others_mean


def whiten(values: Tensor, moments: Tensor) -> Tensor:
    """(value - mean) * rsqrt(unbiased variance + 1e-8), of the values whose parts have these moments [P, 3]."""
    count, mean, squares = merge_moments(moments).tolist()
    factor = (squares / max(count - 1.0, 1.0) + WHITEN_EPS) ** -0.5
    values = values_column(values)
    out = torch.empty_like(values)
    run("whiten", CPU, values.data_ptr(), values.numel(), mean, factor, out.data_ptr())
    return out


def ppo_forward(tokens: PPOTokens, clip: tuple[float, float], denominator: Tensor | float | None) -> PPOResults:
    """(loss, clip fraction, approximate KL) float32 and 1 / denominator float64, scalars.

    ``columns``: logp, old_logp, advantages and weights or None, float32. ``denominator``: None for the tokens that
    count.
    """
    sums = torch.empty(4, dtype=torch.float64)
    fields, keep = ppo_fields(tokens, clip)
    run("ppo_loss", CPU, *fields, sums.data_ptr())
    del keep
    loss, clipped, log_rho, count = sums
    count = count.clamp(min=1.0)
    scale = 1.0 / (count if denominator is None else torch.as_tensor(denominator, dtype=torch.float64))
    return PPOResults((loss * scale).float(), (clipped / count).float(), (-log_rho / count).float(), scale)


def ppo_backward(tokens: PPOTokens, clip: tuple[float, float], scale: Tensor, grad: Tensor) -> Tensor:
    """d loss / d logp * grad, [T] float32."""
    out = torch.empty(tokens.logp.numel(), dtype=torch.float32)
    fields, keep = ppo_fields(tokens, clip)
    run("ppo_loss_backward", CPU, *fields, float(scale * grad), out.data_ptr())
    del keep
    return out


def pack(padded: Tensor, cu_seqlens: Tensor, total: int, left: bool) -> Tensor:
    """The tokens of padded rows [B, L, W], [total, W]; ``left``: the padding comes first."""
    padded, cu_seqlens = padded.contiguous(), offsets_column(cu_seqlens)
    rows, length, width = padded.shape
    out = padded.new_empty(total, width)
    run("pack", CPU, *_copy(padded, out, cu_seqlens), rows, total, length, width, padded.element_size(), left, 0)
    return out


def unpack(values: Tensor, cu_seqlens: Tensor, length: int, left: bool, fill: float) -> Tensor:
    """Packed tokens [N, W] in padded rows [B, length, W]."""
    values, cu_seqlens = values.contiguous(), offsets_column(cu_seqlens)
    rows, (total, width) = cu_seqlens.numel() - 1, values.shape
    out = values.new_empty(rows, length, width)
    sizes = (rows, total, length, width, values.element_size())
    run("unpack", CPU, *_copy(values, out, cu_seqlens), *sizes, left, element_bits(fill, values.dtype))
    return out


def element_bits(fill: float, dtype: torch.dtype) -> int:
    """The bits of an element, as an unsigned number."""
    return int.from_bytes(bytes(torch.tensor(fill, dtype=dtype).reshape(1).view(torch.uint8).tolist()), "little")


def _copy(source: Tensor, out: Tensor, cu_seqlens: Tensor) -> tuple[int, int, int]:
    return source.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr()


def ppo_fields(tokens: PPOTokens, clip: tuple[float, float]) -> tuple[Any, Any]:
    """Addresses, and the tensors that they are of."""
    total, device = tokens.logp.numel(), tokens.logp.device
    logp, old_logp, advantages, weights = (column(each, torch.float32, total, device) for each in tokens[:4])
    tensors = [logp, old_logp, advantages, mask_column(tokens.mask, total, device), weights]
    return (*map(address, tensors), total, *clip), tensors


def values_column(values: Tensor) -> Tensor:
    return column(values, torch.float32, values.numel(), values.device)


def offsets_column(offsets: Tensor) -> Tensor:
    return column(offsets, torch.int64, offsets.numel(), offsets.device)


def _segments(values: Tensor, offsets: Tensor) -> tuple[int, int, int, int]:
    return values.data_ptr(), offsets.data_ptr(), offsets.numel() - 1, values.numel()
