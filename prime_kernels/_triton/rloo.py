"""Launches of the return and whitening kernels on checked tensors."""

from collections.abc import Callable

import torch
from torch import Tensor

from prime_kernels._backends import RlooBatch, RlooSettings
from prime_kernels._launch_counters import arrivals
from prime_kernels._layout import column, mask_column
from prime_kernels._triton._check_kernels import check_rloo_kernel
from prime_kernels._triton._launch import launch_phases, log2, offsets, on_device, scan_config
from prime_kernels._triton._launch_config import ScanConfig
from prime_kernels._triton._rloo_kernels import rloo_kernel, whiten_kernel

# Responses whose groups a program looks up at once, and rows of moments that it merges at once.
RESPONSES, ROWS = 256, 256
# Elements of every tensor that a program checks.
CHECKED = 1024
# Rows of published values, and scratch columns per response.
PUBLISHED, COLUMNS = 7, 5


def checked_batch(batch: RlooBatch) -> RlooBatch:
    """The batch in the types of :class:`RlooBatch`, after device-side assertions about its values: one launch."""
    rewards, mask, outcomes, cu_seqlens, cu_groups, total = batch
    device, responses, groups = outcomes.device, outcomes.numel(), cu_groups.numel() - 1
    of_outcomes, copy_outcomes = _given_and_copy(outcomes, torch.float64)
    of_cu, copy_cu = _given_and_copy(cu_seqlens, torch.int64)
    of_groups, copy_groups = _given_and_copy(cu_groups, torch.int64)
    of_rewards, copy_rewards = (None, None) if rewards is None else _given_and_copy(rewards, torch.float32)
    bytes_of_mask = None if rewards is None else mask_column(mask, total, device)
    largest = max(responses, groups, total) + 1
    with on_device(device):
        check_rloo_kernel[(-(-largest // CHECKED),)](
            # Unused arguments repeat an existing tensor; the kernel does not read them.
            of_outcomes if of_rewards is None else of_rewards,
            of_outcomes if copy_rewards is None else copy_rewards,
            of_cu if bytes_of_mask is None else bytes_of_mask,
            of_outcomes,
            of_outcomes if copy_outcomes is None else copy_outcomes,
            of_cu,
            of_cu if copy_cu is None else copy_cu,
            of_groups,
            of_groups if copy_groups is None else copy_groups,
            total,
            responses,
            groups,
            PROCESS=rewards is not None,
            MASKED=bytes_of_mask is not None,
            COPY_REWARDS=copy_rewards is not None,
            COPY_OUTCOMES=copy_outcomes is not None,
            COPY_CU=copy_cu is not None,
            COPY_GROUPS=copy_groups is not None,
            BLOCK=CHECKED,
        )
    return RlooBatch(
        of_rewards if copy_rewards is None else copy_rewards,
        mask,
        of_outcomes if copy_outcomes is None else copy_outcomes,
        of_cu if copy_cu is None else copy_cu,
        of_groups if copy_groups is None else copy_groups,
        total,
    )


def _given_and_copy(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The values, contiguous, and where they have another dtype an uninitialised tensor for them in this one."""
    return values.contiguous(), None if values.dtype == dtype else values.new_empty(values.shape, dtype=dtype)


def rloo_returns(
    batch: RlooBatch,
    settings: RlooSettings,
    over_ranks: Callable[[Tensor], None] | None,
    config: ScanConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """(returns [total] float32, statistics [programs, 3] float64), with the formulas of ops/rloo_advantages.py.

    A row of the statistics is (count, mean, sum of squares about it) of the returns of some of the tokens. One launch,
    or two if rewards are normalised over ranks: between them ``over_ranks`` gets the largest suffix sum, a float64
    scalar, and puts that of all ranks in its place. It is then called whether there are tokens here or not.
    """
    process_rewards, reward_mask, outcomes, cu_seqlens, cu_groups, total = batch
    device = outcomes.device
    (cu_seqlens, responses), (cu_groups, groups) = offsets(cu_seqlens, device), offsets(cu_groups, device)
    outcomes = column(outcomes, torch.float64, responses, device)
    process_rewards = column(process_rewards, torch.float32, total, device)
    mask = mask_column(reward_mask, total, device)
    with_process = process_rewards is not None
    # Combines the largest return over ranks between two launches; None for one launch.
    across = over_ranks if with_process and settings.normalize_process else None
    returns = outcomes.new_empty(total, dtype=torch.float32)
    if total == 0:
        if across is not None:
            across(outcomes.new_zeros(()))
        return returns, outcomes.new_zeros(1, 3)
    config = config or scan_config(total, device)
    stats = outcomes.new_empty(config.programs, 3)
    published = outcomes.new_empty(PUBLISHED, config.slots)
    columns = outcomes.new_empty(COLUMNS, responses)
    largest = outcomes.new_empty(())
    with on_device(device):
        arguments = (
            # Unused arguments repeat an existing tensor; the kernel does not read them.
            process_rewards if with_process else returns,
            cu_seqlens if mask is None else mask,
            outcomes,
            cu_seqlens,
            cu_groups,
            returns,
            stats,
            published,
            columns,
            largest,
            arrivals(device),
            total,
            responses,
            groups,
            config.tiles,
            settings.gamma_process,
            log2(settings.gamma_process),
            log2(settings.gamma_outcome),
            settings.process_coef,
            settings.outcome_coef,
        )
        options = {
            "PROCESS": with_process,
            "MASKED": with_process and mask is not None,
            "NORMALIZE": with_process and settings.normalize_process,
            "ACROSS": across is not None,
            "PAPER": settings.process_baseline == "paper",
            "RESPONSES": RESPONSES,
        }
        if across is not None:
            launch_phases(rloo_kernel, config, arguments, 0, 1, **options)
            across(largest)
            launch_phases(rloo_kernel, config, arguments, 2, 3, **options)
        else:
            launch_phases(rloo_kernel, config, arguments, 0 if with_process else 2, 3, **options)
    return returns, stats


def whiten(values: Tensor, stats: Tensor, config: ScanConfig | None = None) -> Tensor:
    """[T] float32: (value - mean) / sqrt(unbiased variance + 1e-8) of the statistics of rloo_returns, in one launch.

    ``stats`` [rows, 3] float64 may hold rows of more tokens than these, such as those of other ranks.
    """
    total, device = values.numel(), values.device
    values, out = column(values, torch.float32, total, device), values.new_empty(total)
    if total == 0:
        return out
    config = config or scan_config(total, device)
    rows = stats.shape[0]
    stats = column(stats, torch.float64, 3 * rows, device)
    with on_device(device):
        whiten_kernel[(-(-total // config.block),)](
            values, stats, out, total, rows, ROWS=ROWS, BLOCK=config.block, num_warps=config.num_warps
        )
    return out
