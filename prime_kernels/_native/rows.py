"""Row kernels of log-probs in C++: CPU tensors on as many threads as torch has, CUDA tensors on their current stream.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._backends import RowGradient, RowResults
from prime_kernels._layout import column, is_rows, mask_column, row_stride
from prime_kernels._native import DTYPES, address, run


def token_log_probs(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
) -> RowResults:
    """Results [models, N] of one to three models in one pass; they may differ in dtype and row stride."""
    first, count = models[0], len(models)
    rows, vocabulary = first.shape
    assert all(is_rows(z) and z.shape == first.shape and z.device == first.device for z in models)
    ids, mask = column(ids, torch.int64, rows, first.device), mask_column(mask, rows, first.device)
    logp, lse = (torch.empty(count, rows, dtype=torch.float32, device=first.device) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    results = zip(logp, lse, [None] * count if entropy is None else entropy, strict=True)
    fields = [
        (z.data_ptr(), row_stride(z), DTYPES[z.dtype], temperature, *map(address, result))
        for z, temperature, result in zip(models, temperatures, results, strict=True)
    ]
    run("log_probs_forward", first.device, fields, ids.data_ptr(), address(mask), rows, vocabulary)
    return RowResults(logp, lse, entropy)


def logits_gradient(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    gradient: RowGradient,
    temperature: float,
    out: Tensor,
    partial: bool = False,
) -> None:
    """Write d loss / d logits [N, V] to ``out``."""
    rows, vocabulary = logits.shape
    device = logits.device
    assert is_rows(logits) and is_rows(out) and out.device == device
    assert out.dtype == logits.dtype and out.shape == logits.shape
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    columns = [column(each, torch.float32, rows, device) for each in gradient]
    fields = (logits.data_ptr(), row_stride(logits), DTYPES[logits.dtype], temperature, ids.data_ptr(), address(mask))
    addresses = [address(each) for each in columns]
    run("log_probs_backward", device, *fields, rows, vocabulary, *addresses, out.data_ptr(), row_stride(out), partial)
