"""Token passes on the CUDA C++ kernels, with the functions of packed_cpu.py; nothing waits for the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from prime_kernels import _native
from prime_kernels._backends import PPOResults, PPOTokens, PRMResults, RlooBatch, RlooSettings
from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column, mask_column
from prime_kernels._native import address
from prime_kernels._native.packed_cpu import element_bits, offsets_column, ppo_fields, values_column

PRM_KINDS = ("ce", "dpo", "kto", "nca")


def segment_scan(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """One launch; float32 or float64 values."""
    values, cu_seqlens = values.contiguous(), offsets_column(cu_seqlens)
    wide = values.dtype == torch.float64
    out, left = torch.empty_like(values), _of_blocks(values, 2)
    sizes = (cu_seqlens.numel() - 1, values.numel())
    addresses = (values.data_ptr(), cu_seqlens.data_ptr())
    _run("segment_scan", values, *addresses, *sizes, gamma, wide, reverse, out.data_ptr(), left.data_ptr())
    return out


def segment_sum(values: Tensor, cu_segments: Tensor) -> Tensor:
    """One launch; [S] float64."""
    values, cu_segments = values_column(values), offsets_column(cu_segments)
    segments = cu_segments.numel() - 1
    out, left = values.new_empty(segments, dtype=torch.float64), _of_blocks(values, 2)
    fields = (values.data_ptr(), cu_segments.data_ptr(), segments, values.numel(), out.data_ptr(), left.data_ptr())
    _run("segment_sum", values, *fields, arrivals(values.device).data_ptr())
    return out


def segment_fill(values: Tensor, cu_segments: Tensor, total: int, factor: Tensor | None = None) -> Tensor:
    """One launch; [total] float32 from [S] float64."""
    values, cu_segments = values.contiguous(), offsets_column(cu_segments)
    assert values.dtype == torch.float64 and values.numel() == cu_segments.numel() - 1
    factor = None if factor is None else column(factor, torch.float32, 1, values.device)
    out = values.new_empty(total, dtype=torch.float32)
    addresses = (values.data_ptr(), address(factor), cu_segments.data_ptr())
    _run("segment_fill", values, *addresses, values.numel(), total, out.data_ptr())
    return out


def rloo_returns(
    batch: RlooBatch,
    settings: RlooSettings,
    over_ranks: Callable[[Tensor], None] | None,
) -> tuple[Tensor, Tensor]:
    """(returns [T] float32, (count, mean, squares about it) of each block's share [P, 3] float64).

    One launch; two if the largest return is needed from other ranks in between.
    """
    process_rewards, reward_mask, outcomes, cu_seqlens, cu_groups, total = batch
    responses, device = outcomes.numel(), outcomes.device
    outcomes = column(outcomes, torch.float64, responses, device)
    cu_seqlens, cu_groups = offsets_column(cu_seqlens), offsets_column(cu_groups)
    rewards = None if process_rewards is None else values_column(process_rewards)
    mask = mask_column(reward_mask, total, device)
    out, moments = outcomes.new_empty(total, dtype=torch.float32), _of_blocks(outcomes, 3)
    bytes_of_blocks = _native.constant("RLOO_WORKSPACE") + 8 * _native.constant("MAX_BLOCKS")
    workspace = outcomes.new_empty(bytes_of_blocks // 8 + 5 * responses)
    largest = None
    inputs = (address(each) for each in (rewards, mask, outcomes, cu_seqlens, cu_groups))
    sizes = (responses, cu_groups.numel() - 1, total)
    fields = (*inputs, *sizes, *settings[:5], settings.process_baseline == "paper")
    outputs = (moments.data_ptr(), workspace.data_ptr(), out.data_ptr())
    apart = over_ranks is not None and settings.normalize_process and rewards is not None
    if apart:
        largest = outcomes.new_empty(())
        _run("rloo_returns", outcomes, *fields, True, False, largest.data_ptr(), *outputs)
        over_ranks(largest)
    first = rewards is not None and not apart
    blocks = _run("rloo_returns", outcomes, *fields, first, True, address(largest), *outputs)
    return out, moments[:blocks]


def whiten(values: Tensor, moments: Tensor) -> Tensor:
    """One launch."""
    values, moments = values_column(values), moments.contiguous()
    assert moments.dtype == torch.float64 and moments.shape[1:] == (3,)
    out = torch.empty_like(values)
    _run("whiten", values, values.data_ptr(), values.numel(), moments.data_ptr(), moments.shape[0], out.data_ptr())
    return out


def ppo_forward(tokens: PPOTokens, clip: tuple[float, float], denominator: Tensor | float | None) -> PPOResults:
    """One launch; (loss, clip fraction, approximate KL) float32 and 1 / denominator float64, scalars."""
    fields, keep = ppo_fields(tokens, clip)
    logp = tokens.logp
    results, scale = logp.new_empty(3, dtype=torch.float32), logp.new_empty((), dtype=torch.float64)
    sums, number = _of_blocks(logp, 4), 0.0
    if isinstance(denominator, Tensor):
        denominator = column(denominator, torch.float64, 1, logp.device)
    elif denominator is not None:
        denominator, number = None, float(denominator)
    outputs = (results.data_ptr(), scale.data_ptr(), sums.data_ptr(), arrivals(logp.device).data_ptr())
    _run("ppo_loss", logp, *fields, address(denominator), number, *outputs)
    del keep
    return PPOResults(*results.unbind(), scale)


def ppo_backward(tokens: PPOTokens, clip: tuple[float, float], scale: Tensor, grad: Tensor) -> Tensor:
    """One launch; d loss / d logp * grad, [T] float32."""
    fields, keep = ppo_fields(tokens, clip)
    grad = column(grad, torch.float32, 1, scale.device)
    out = scale.new_empty(tokens.logp.numel(), dtype=torch.float32)
    _run("ppo_loss_backward", scale, *fields, scale.data_ptr(), grad.data_ptr(), out.data_ptr())
    del keep
    return out


def prm_forward(
    log_ratio: Tensor, outcomes: Tensor, cu_seqlens: Tensor, cu_groups: Tensor | None, kind: str, beta: float
) -> PRMResults:
    """One launch; (loss, pair accuracy) float32 scalars and d loss / d sum of a response's log-ratios, [B] float64."""
    log_ratio, cu_seqlens = values_column(log_ratio), offsets_column(cu_seqlens)
    outcomes = column(outcomes, torch.float64, cu_seqlens.numel() - 1, log_ratio.device)
    cu_groups = None if cu_groups is None else offsets_column(cu_groups)
    delta, slope = torch.empty_like(outcomes), torch.empty_like(outcomes)
    results, left = log_ratio.new_empty(2), _of_blocks(log_ratio, 2)
    inputs = (address(each) for each in (log_ratio, outcomes, cu_seqlens, cu_groups))
    sizes = (log_ratio.numel(), outcomes.numel(), 0 if cu_groups is None else cu_groups.numel() - 1)
    scratch = (each.data_ptr() for each in (delta, slope, left, arrivals(log_ratio.device)))
    _run("prm_loss", log_ratio, *inputs, *sizes, beta, PRM_KINDS.index(kind), *scratch, results.data_ptr())
    return PRMResults(*results.unbind(), slope)


def pack(padded: Tensor, cu_seqlens: Tensor, total: int, left: bool) -> Tensor:
    """One launch; the tokens of padded rows [B, L, W], [total, W]."""
    padded, cu_seqlens = padded.contiguous(), offsets_column(cu_seqlens)
    rows, length, width = padded.shape
    out = padded.new_empty(total, width)
    addresses = (padded.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr())
    _run("pack", padded, *addresses, rows, total, length, width, padded.element_size(), left, 0)
    return out


def unpack(values: Tensor, cu_seqlens: Tensor, length: int, left: bool, fill: float) -> Tensor:
    """One launch; packed tokens [N, W] in padded rows [B, length, W]."""
    values, cu_seqlens = values.contiguous(), offsets_column(cu_seqlens)
    rows, (total, width) = cu_seqlens.numel() - 1, values.shape
    out = values.new_empty(rows, length, width)
    addresses = (values.data_ptr(), out.data_ptr(), cu_seqlens.data_ptr())
    bits = element_bits(fill, values.dtype)
    _run("unpack", values, *addresses, rows, total, length, width, values.element_size(), left, bits)
    return out


def _of_blocks(like: Tensor, fields: int) -> Tensor:
    """Scratch for what each block leaves, float64."""
    return like.new_empty(_native.constant("MAX_BLOCKS"), fields, dtype=torch.float64)


def _run(name: str, on: Tensor, *fields: object) -> object:
    return _native.run(name, on.device, *fields)
