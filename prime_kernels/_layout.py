"""Memory-layout checks before a tensor's address is passed to a kernel.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

from typing import overload

import torch
from torch import Tensor


def is_rows(tensor: Tensor) -> bool:
    """Whether a [N, V] tensor has a last stride of 1; the row stride is free."""
    return tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1 or tensor.shape[0] == 0)


def row_stride(rows: Tensor) -> int:
    """Elements from row to row; 0 for a single row, whose stride has no meaning."""
    return rows.stride(0) if rows.shape[0] > 1 else 0


def takes_gradient(logits: Tensor, out: Tensor) -> bool:
    """Whether the gradient of these logits can have the dtype of ``out``: their own, or one of 16 bits for float32."""
    narrow = logits.dtype == torch.float32 and out.dtype in (torch.bfloat16, torch.float16)
    return out.dtype == logits.dtype or narrow


@overload
def column(tensor: Tensor, dtype: torch.dtype, size: int, device: torch.device) -> Tensor: ...


@overload
def column(tensor: None, dtype: torch.dtype, size: int, device: torch.device) -> None: ...


@overload
def column(tensor: Tensor | None, dtype: torch.dtype, size: int, device: torch.device) -> Tensor | None: ...


def column(tensor: Tensor | None, dtype: torch.dtype, size: int, device: torch.device) -> Tensor | None:
    """One contiguous value per row; None stays None."""
    if tensor is None:
        return None
    assert tensor.dtype == dtype and tensor.numel() == size and tensor.device == device
    return tensor.contiguous()


def mask_column(mask: Tensor | None, size: int, device: torch.device) -> Tensor | None:
    """A bool mask as bytes of 0 or 1: reinterpreted, not copied."""
    return None if mask is None else column(mask, torch.bool, size, device).view(torch.uint8)


def offsets_column(offsets: Tensor, device: torch.device) -> Tensor:
    """Contiguous int64 offsets."""
    return column(offsets, torch.int64, offsets.numel(), device)
