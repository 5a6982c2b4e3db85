"""Launches of the row kernels on checked tensors: what log_probs and log_ratios call."""

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._triton import interpreted
from prime_kernels._triton._config import Config, Device, choose
from prime_kernels._triton._log_probs_kernels import backward_kernel, combine_kernel, forward_kernel

# Columns of 16-byte loads at any dtype; strides and addresses must be multiples for these.
ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# What each part of a split row leaves for the second kernel: highest, sum, weighted sum and the target's logit.
PARTIAL_FIELDS = 4


def log_probs_forward(
    logits2d: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy or None) of each row of [N, V], float32; lse is of logits / temperature."""
    logp, lse, entropy = forward([logits2d], ids, mask, [temperature], with_entropy)
    return logp[0], lse[0], None if entropy is None else entropy[0]


def log_ratios_forward(
    models: Sequence[Tensor], ids: Tensor, mask: Tensor | None, temperatures: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(logp, lse), each [models, N]: one launch for up to three [N, V] of one dtype, one a model otherwise."""
    if len({logits2d.dtype for logits2d in models}) == 1:
        return forward(models, ids, mask, temperatures, False)[:2]
    each = [
        forward([logits2d], ids, mask, [temperature], False)
        for logits2d, temperature in zip(models, temperatures, strict=True)
    ]
    return torch.cat([logp for logp, _, _ in each]), torch.cat([lse for _, lse, _ in each])


def forward(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy or None), each [models, N], of one to three models of one dtype."""
    first, count = models[0], len(models)
    rows, vocabulary = first.shape
    assert all(_is_rows(z) and z.shape == first.shape and z.dtype == first.dtype for z in models) and vocabulary < 2**31
    ids, mask = _dense(ids, torch.int64, rows), _bytes(mask, rows)
    logp, lse = first.new_empty(count, rows, dtype=torch.float32), first.new_empty(count, rows, dtype=torch.float32)
    entropy = torch.empty_like(lse) if with_entropy else None
    if rows == 0:
        return logp, lse, entropy
    config = config or choose(count * rows, vocabulary, first.element_size(), _device(first.device))
    splits = config.splits
    partial = lse if splits == 1 else first.new_empty(PARTIAL_FIELDS, count, rows, splits, dtype=torch.float32)
    unit = _unit(*models)
    # Unused places repeat a tensor that is there: a kernel never touches them.
    padded = [*models, *[first] * (3 - count)]
    inverses = [1.0 / temperature for temperature in (*temperatures, *[1.0] * (3 - count))]
    common = {"MODELS": count, "MASKED": mask is not None, "ENTROPY": with_entropy, "SPLITS": splits}
    outputs = (logp, lse, lse if entropy is None else entropy)
    mask = ids if mask is None else mask
    with _on(first.device):
        forward_kernel[(rows, splits, count)](
            *padded,
            *[_stride(logits2d) // unit for logits2d in padded],
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
            combine_kernel[(rows, count)](partial, *inverses, mask, *outputs, rows, **common, num_warps=1)
    return logp, lse, entropy


def log_probs_backward(
    logits2d: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
    config: Config | None = None,
) -> None:
    """Write d loss / d logits to ``out``, which may be ``logits2d`` itself. ``entropy`` is that of the forward."""
    rows, vocabulary = logits2d.shape
    assert _is_rows(logits2d) and _is_rows(out) and out.dtype == logits2d.dtype and out.shape == logits2d.shape
    if rows == 0:
        return
    ids, mask = _dense(ids, torch.int64, rows), _bytes(mask, rows)
    lse, grad_logp = (_dense(column, torch.float32, rows) for column in (lse, grad_logp))
    with_entropy = grad_entropy is not None
    if with_entropy:
        entropy, grad_entropy = (_dense(column, torch.float32, rows) for column in (entropy, grad_entropy))
    config = config or choose(rows, vocabulary, logits2d.element_size(), _device(logits2d.device))
    unit = _unit(logits2d, out)
    with _on(logits2d.device):
        backward_kernel[(rows, config.splits)](
            logits2d,
            out,
            _stride(logits2d) // unit,
            _stride(out) // unit,
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
    aligned = all(z.data_ptr() % ALIGNED_BYTES == 0 and _stride(z) % ALIGNED_COLUMNS == 0 for z in tensors)
    return ALIGNED_COLUMNS if aligned else 1


def _stride(logits2d: Tensor) -> int:
    """Elements from row to row; a single row goes nowhere, whatever its stride says."""
    return logits2d.stride(0) if logits2d.shape[0] > 1 else 0


def _is_rows(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1)


def _dense(tensor: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    assert tensor.dtype == dtype and tensor.numel() == size
    return tensor.contiguous()


def _bytes(mask: Tensor | None, size: int) -> Tensor | None:
    """A bool is one byte of 0 or 1: reinterpreted, not copied."""
    return None if mask is None else _dense(mask, torch.bool, size).view(torch.uint8)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _device(device: torch.device) -> Device:
    return Device() if device.type != "cuda" or interpreted() else _cuda_device(device)


@functools.cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.multi_processor_count, (properties.major, properties.minor))
