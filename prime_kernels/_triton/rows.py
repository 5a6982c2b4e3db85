"""Launches of the row kernels on checked tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._backends import RowCandidates, RowGradient, RowResults
from prime_kernels._eager.rows import SEARCH_SLACK, ascending
from prime_kernels._layout import column, is_rows, mask_column, row_stride, takes_gradient
from prime_kernels._triton._candidates_kernel import search_kernel
from prime_kernels._triton._launch import device_of, on_device
from prime_kernels._triton._launch_config import Config, choose, power_of_two_from
from prime_kernels._triton._log_probs_kernels import backward_kernel, combine_kernel, forward_kernel

# Rows that all start at 16-byte boundaries: strides that are multiples of 8 columns (for any dtype), aligned addresses.
ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# Results of each part of a split row for the second kernel: maximum, sum, weighted sum and the target's logit.
PARTIAL_FIELDS = 4


def token_log_probs(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
    config: Config | None = None,
) -> RowResults:
    """Results [models, N] of one to three models: one launch if they share a dtype, else one launch each."""
    first = models[0]
    if any(z.dtype != first.dtype for z in models):
        each = zip(models, temperatures, strict=True)
        parts = [token_log_probs([z], ids, mask, [temperature], with_entropy, config) for z, temperature in each]
        return RowResults.cat(parts, 0)
    return _scored(models, ids, mask, temperatures, with_entropy, config or _chosen(models), None)


def _chosen(models: Sequence[Tensor]) -> Config:
    (rows, vocabulary), first = models[0].shape, models[0]
    return choose(max(1, len(models) * rows), vocabulary, first.element_size(), device_of(first.device))


def _scored(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
    config: Config,
    lanes: Tensor | None,
) -> RowResults:
    """Results of models of one dtype; ``lanes`` [models, N, splits, lanes of a block] gets the maxima of lanes."""
    first, count = models[0], len(models)
    rows, vocabulary = first.shape
    assert all(is_rows(z) and z.shape == first.shape for z in models) and vocabulary < 2**31
    ids, mask = column(ids, torch.int64, rows, first.device), mask_column(mask, rows, first.device)
    logp, lse = first.new_empty(count, rows, dtype=torch.float32), first.new_empty(count, rows, dtype=torch.float32)
    entropy = torch.empty_like(lse) if with_entropy else None
    if rows == 0:
        return RowResults(logp, lse, entropy)
    splits = config.splits
    partial = lse if splits == 1 else first.new_empty(PARTIAL_FIELDS, count, rows, splits, dtype=torch.float32)
    alignment = _alignment(*models)
    # Unused arguments repeat an existing tensor; the kernel does not read them.
    padded = [*models, *[first] * (3 - count)]
    inverses = [1.0 / temperature for temperature in (*temperatures, *[1.0] * (3 - count))]
    common = {"MODELS": count, "MASKED": mask is not None, "ENTROPY": with_entropy, "SPLITS": splits}
    outputs = (logp, lse, lse if entropy is None else entropy)
    mask = ids if mask is None else mask
    with on_device(first.device):
        forward_kernel[(rows, splits, count)](
            *padded,
            *[row_stride(z) // alignment for z in padded],
            *inverses,
            ids,
            mask,
            *outputs,
            partial,
            lse if lanes is None else lanes,
            rows,
            vocabulary,
            _chunk(vocabulary, config),
            SEARCHED=lanes is not None,
            **common,
            ALIGNMENT=alignment,
            WIDTH=ALIGNED_BYTES // first.element_size(),
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            combine_kernel[(rows, count)](partial, *inverses, mask, *outputs, rows, **common, num_warps=1)
    return RowResults(logp, lse, entropy)


def token_candidates(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, log_min_prob: float, slots: int
) -> RowCandidates:
    """Results and candidates of logits [N, V]: a second launch reads the lanes again that have candidates."""
    (rows, vocabulary), device = logits.shape, logits.device
    config, width = _chosen([logits]), ALIGNED_BYTES // logits.element_size()
    lanes = logits.new_empty(1, rows, config.splits, config.block // width, dtype=torch.float32)
    results = _scored([logits], ids, mask, [temperature], False, config, lanes).only_model()
    found_ids = torch.full((rows, slots), -1, dtype=torch.int64, device=device)
    found = torch.full((rows, slots), -torch.inf, dtype=torch.float32, device=device)
    if rows:
        ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
        alignment = _alignment(logits)
        counts = torch.zeros(rows, dtype=torch.int32, device=device)
        with on_device(device):
            search_kernel[(rows, config.splits)](
                logits,
                row_stride(logits) // alignment,
                1.0 / temperature,
                log_min_prob - SEARCH_SLACK,
                ids,
                ids if mask is None else mask,
                results.lse,
                lanes,
                counts,
                found_ids,
                found,
                vocabulary,
                _chunk(vocabulary, config),
                slots,
                MASKED=mask is not None,
                SPLITS=config.splits,
                ALIGNMENT=alignment,
                WIDTH=width,
                BLOCK=config.block,
                BLOCKS=power_of_two_from(_chunk(vocabulary, config) // config.block),
                num_warps=1,
            )
    return RowCandidates(results.logp, results.lse, *ascending(found_ids, found))


def logits_gradient(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    gradient: RowGradient,
    temperature: float,
    out: Tensor,
    partial: bool = False,
    config: Config | None = None,
) -> None:
    """Write d loss / d logits [N, V] to ``out``. The kernel takes any id, so ``partial`` changes nothing here."""
    rows, vocabulary = logits.shape
    device = logits.device
    assert is_rows(logits) and is_rows(out) and takes_gradient(logits, out) and out.shape == logits.shape
    if rows == 0:
        return
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    lse = column(gradient.lse, torch.float32, rows, device)
    entropy, grad_logp, grad_entropy = (column(each, torch.float32, rows, device) for each in gradient[1:])
    grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
    with_entropy = grad_entropy is not None
    config = config or choose(rows, vocabulary, logits.element_size(), device_of(device))
    alignment = _alignment(logits, out)
    with on_device(device):
        backward_kernel[(rows, config.splits)](
            logits,
            out,
            row_stride(logits) // alignment,
            row_stride(out) // alignment,
            1.0 / temperature,
            ids,
            ids if mask is None else mask,
            lse,
            entropy if with_entropy else lse,
            grad_logp,
            grad_entropy if with_entropy else lse,
            vocabulary,
            _chunk(vocabulary, config),
            MASKED=mask is not None,
            ENTROPY=with_entropy,
            ALIGNMENT=alignment,
            PEELED=alignment > 1 or _alike(logits, out),
            WIDTH=ALIGNED_BYTES // out.element_size(),
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _chunk(vocabulary: int, config: Config) -> int:
    """Columns of one part of a row: whole blocks, so that every part starts at an aligned column."""
    blocks = -(-vocabulary // config.block)
    return -(-blocks // config.splits) * config.block


def _alignment(*tensors: Tensor) -> int:
    """The columns that every row stride is a multiple of: 8 if all rows start at 16-byte boundaries, else 1."""
    aligned = all(z.data_ptr() % ALIGNED_BYTES == 0 and row_stride(z) % ALIGNED_COLUMNS == 0 for z in tensors)
    return ALIGNED_COLUMNS if aligned else 1


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one dtype and their rows start at the same places between 16-byte boundaries."""
    if one.dtype != other.dtype:
        return False
    apart = (row_stride(one) - row_stride(other)) * one.element_size()
    return (one.data_ptr() - other.data_ptr()) % ALIGNED_BYTES == 0 and apart % ALIGNED_BYTES == 0
