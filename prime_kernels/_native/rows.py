"""Row kernels in C++: CPU tensors on as many threads as torch has, CUDA tensors on the current stream of their device.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._backends import RowCandidates, RowGradient, RowResults
from prime_kernels._eager.rows import ascending
from prime_kernels._layout import column, is_rows, mask_column, row_stride, takes_gradient
from prime_kernels._native import _C, DTYPES, address

FLOAT32_BYTES = 4


def token_log_probs(
    models: Sequence[Tensor], ids: Tensor, mask: Tensor | None, temperatures: Sequence[float], with_entropy: bool
) -> RowResults:
    """Results [models, N] of one to three models in one pass; they may differ in dtype and row stride."""
    first, count = models[0], len(models)
    (rows, vocabulary), device = first.shape, first.device
    assert all(is_rows(z) and z.shape == first.shape and z.device == device for z in models)
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    logp = torch.empty(count, rows, dtype=torch.float32, device=device)
    lse = torch.empty_like(logp)
    entropy = torch.empty_like(logp) if with_entropy else None
    addresses = logp.data_ptr(), lse.data_ptr(), address(entropy)
    fields = []
    for place, (z, temperature) in enumerate(zip(models, temperatures, strict=True)):
        skip = place * rows * FLOAT32_BYTES
        fields.append(
            {
                "logits": z.data_ptr(),
                "stride": row_stride(z),
                "dtype": DTYPES[z.dtype],
                "temperature": temperature,
                "logp": addresses[0] + skip,
                "lse": addresses[1] + skip,
                "entropy": addresses[2] + skip if with_entropy else 0,
            }
        )
    common = {"models": fields, "ids": ids.data_ptr(), "mask": address(mask), "n_rows": rows, "n_cols": vocabulary}
    if device.type == "cpu":
        _C.log_probs_forward(**common, n_threads=torch.get_num_threads())
    else:
        # A launch goes to the current device, which need not be that of the tensors.
        with torch.cuda.device(device):
            _C.cuda_log_probs_forward(**common, stream=torch.cuda.current_stream(device).cuda_stream)
    return RowResults(logp, lse, entropy)


def token_candidates(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, log_min_prob: float, slots: int
) -> RowCandidates:
    """Results and candidates of logits [N, V] in one pass."""
    (rows, vocabulary), device = logits.shape, logits.device
    assert is_rows(logits)
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    logp, lse = torch.empty(2, rows, dtype=torch.float32, device=device)
    found_ids = torch.empty(rows, slots, dtype=torch.int64, device=device)
    found = torch.empty(rows, slots, dtype=torch.float32, device=device)
    fields = {
        "logits": logits.data_ptr(),
        "stride": row_stride(logits),
        "dtype": DTYPES[logits.dtype],
        "ids": ids.data_ptr(),
        "mask": address(mask),
        "n_rows": rows,
        "n_cols": vocabulary,
        "temperature": temperature,
        "log_min_prob": log_min_prob,
        "n_slots": slots,
        "logp": logp.data_ptr(),
        "lse": lse.data_ptr(),
        "found_ids": found_ids.data_ptr(),
        "found": found.data_ptr(),
    }
    if device.type == "cpu":
        _C.candidates(**fields, n_threads=torch.get_num_threads())
        return RowCandidates(logp, lse, found_ids, found)
    with torch.cuda.device(device):
        _C.cuda_candidates(**fields, stream=torch.cuda.current_stream(device).cuda_stream)
    return RowCandidates(logp, lse, *ascending(found_ids, found))


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
    (rows, vocabulary), device = logits.shape, logits.device
    assert is_rows(logits) and is_rows(out) and out.device == device
    assert takes_gradient(logits, out) and out.shape == logits.shape
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    lse, entropy, grad_logp, grad_entropy = (column(each, torch.float32, rows, device) for each in gradient)
    fields = {
        "logits": logits.data_ptr(),
        "logits_stride": row_stride(logits),
        "dtype": DTYPES[logits.dtype],
        "temperature": temperature,
        "ids": ids.data_ptr(),
        "mask": address(mask),
        "n_rows": rows,
        "n_cols": vocabulary,
        "lse": address(lse),
        "entropy": address(entropy),
        "grad_logp": address(grad_logp),
        "grad_entropy": address(grad_entropy),
        "out": out.data_ptr(),
        "out_stride": row_stride(out),
        "out_dtype": DTYPES[out.dtype],
        "partial": partial,
    }
    if device.type == "cpu":
        _C.log_probs_backward(**fields, n_threads=torch.get_num_threads())
    else:
        with torch.cuda.device(device):
            _C.cuda_log_probs_backward(**fields, stream=torch.cuda.current_stream(device).cuda_stream)
