"""What the kernels ask of tensors before they become addresses: rows of unit stride, dense columns beside them.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

import torch
from torch import Tensor


def is_rows(tensor: Tensor) -> bool:
    """[N, V] with neighbouring columns side by side, at any row stride."""
    return tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1 or tensor.shape[0] == 0)


def row_stride(rows: Tensor) -> int:
    """Elements from row to row; a single row goes nowhere, whatever its stride says."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


def column(tensor: Tensor | None, dtype: torch.dtype, size: int, device: torch.device) -> Tensor | None:
    """One value a row, side by side; None stays None."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype and tensor.numel() == size and tensor.device == device
    return tensor.contiguous()


def mask_column(mask: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """A bool is one byte of 0 or 1: reinterpreted, not copied."""
    return None if mask is None else column(mask, torch.bool, size, device).view(torch.uint8)
