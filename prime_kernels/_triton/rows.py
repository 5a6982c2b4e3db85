"""Launches of the row kernels on checked tensors: what log_probs and log_ratios call."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._layout import column, is_rows, mask_column, row_stride
from prime_kernels._triton import interpreted
from prime_kernels._triton._launch_config import Config, Device, choose
from prime_kernels._triton._log_probs_kernels import backward_kernel, combine_kernel, forward_kernel

# Columns of 16-byte loads at any dtype; strides and addresses must be multiples for these.
ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# What each part of a split row leaves for the second kernel: highest, sum, weighted sum and the target's logit.
PARTIAL_FIELDS = 4


def forward(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy or None), each [models, N] float32, of one to three models' [N, V] logits.

    One launch for models of one dtype, one a model otherwise. lse is of logits / temperature. Masked rows are 0.
    """
    first, count = models[0], len(models)
    if any(z.dtype != first.dtype for z in models):
        each = zip(models, temperatures, strict=True)
        parts = [forward([z], ids, mask, [temperature], with_entropy, config) for z, temperature in each]
        return tuple(None if part[0] is None else torch.cat(part) for part in zip(*parts, strict=True))
    rows, vocabulary = first.shape
    assert all(is_rows(z) and z.shape == first.shape for z in models) and vocabulary < 2**31
    ids, mask = column(ids, torch.int64, rows, first.device), mask_column(mask, rows, first.device)
    logp, lse = first.new_empty(count, rows, dtype=torch.float32), first.new_empty(count, rows, dtype=torch.float32)
    entropy = torch.empty_like(lse) if with_entropy else None
    if rows == 0:
        return logp, lse, entropy
    config = config or choose(count * rows, vocabulary, first.element_size(), device_of(first.device))
    splits = config.splits
    partial = lse if splits == 1 else first.new_empty(PARTIAL_FIELDS, count, rows, splits, dtype=torch.float32)
    unit = _unit(*models)
    # Unused places repeat a tensor that is there: a kernel never touches them.
    padded = [*models, *[first] * (3 - count)]
    inverses = [1.0 / temperature for temperature in (*temperatures, *[1.0] * (3 - count))]
    common = {"MODELS": count, "MASKED": mask is not None, "ENTROPY": with_entropy, "SPLITS": splits}
    outputs = (logp, lse, lse if entropy is None else entropy)
    mask = ids if mask is None else mask
    with on_device(first.device):
        forward_kernel[(rows, splits, count)](
            *padded,
            *[row_stride(z) // unit for z in padded],
            *inverses,
            ids,
            mask,
            *outputs,
            partial,
            rows,
            vocabulary,
            _chunk(vocabulary, config),
            **common,
            UNIT=unit,
            WIDTH=ALIGNED_BYTES // first.element_size(),
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if splits > 1:
            combine_kernel[(rows, count)](
                partial, *inverses, mask, *outputs, rows, **common, ONE_OWNER=False, num_warps=1
            )
    return logp, lse, entropy


def backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
    config: Config | None = None,
    partial: bool = False,
) -> None:
    """Write d loss / d logits [N, V] to ``out``, which may be ``logits`` itself. ``entropy`` is that of the forward.

    ``partial``: these are some of the columns of a row, with the lse and entropy of all, and ids may lie outside them.
    The kernel takes every id: one that is outside has no column to write to.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    assert is_rows(logits) and is_rows(out) and out.dtype == logits.dtype and out.shape == logits.shape
    if rows == 0:
        return
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    grad_logp = torch.zeros_like(lse) if grad_logp is None else grad_logp
    with_entropy = grad_entropy is not None
    lse, entropy, grad_logp, grad_entropy = (
        column(each, torch.float32, rows, device) for each in (lse, entropy, grad_logp, grad_entropy)
    )
    config = config or choose(rows, vocabulary, logits.element_size(), device_of(device))
    unit = _unit(logits, out)
    with on_device(device):
        backward_kernel[(rows, config.splits)](
            logits,
            out,
            row_stride(logits) // unit,
            row_stride(out) // unit,
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
            UNIT=unit,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def _chunk(vocabulary: int, config: Config) -> int:
    """Columns of one part of a row: whole blocks, so that every part starts where wide loads may."""
    blocks = -(-vocabulary // config.block)
    return -(-blocks // config.splits) * config.block


def _unit(*tensors: Tensor) -> int:
    """What every row stride is a multiple of, as far as 16-byte loads go.

    One answer for all models of a launch: equal logits give equal bits whatever the strides they come with.
    """
    aligned = all(z.data_ptr() % ALIGNED_BYTES == 0 and row_stride(z) % ALIGNED_COLUMNS == 0 for z in tensors)
    return ALIGNED_COLUMNS if aligned else 1


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def device_of(device: torch.device) -> Device:
    return Device() if device.type != "cuda" or interpreted() else _cuda_device(device)


@functools.cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))
