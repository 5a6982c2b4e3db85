"""The extension, seen from torch: tensors become addresses, sizes and strides here and nowhere else.

Callers have checked shapes, dtypes and ranges; the assertions below only guard memory.
"""

import torch
from torch import Tensor

try:
    from prime_kernels import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None
    _reason = f"the extension prime_kernels._C cannot be imported ({error}); build it with: pip install ."
else:
    _reason = None
    _DTYPES = {torch.float32: _C.FLOAT32, torch.bfloat16: _C.BFLOAT16, torch.float16: _C.FLOAT16}


def unavailable_reason() -> str | None:
    """None if the extension can be used, otherwise why not and what to do about it."""
    return _reason


def build_info() -> dict[str, str | bool]:
    """How the extension was built: compiler, flags, openmp, cuda, and cuda_detail (architectures, or why without)."""
    return _C.build_info()


def log_probs_forward(
    logits2d: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy or None) of each row of [N, V], float32; lse is of logits / temperature."""
    rows = logits2d.shape[0]
    fields, keep = _row_fields(logits2d, ids, mask, temperature)
    logp, lse = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.float32)
    entropy = torch.empty(rows, dtype=torch.float32) if with_entropy else None
    _C.log_probs_forward(*fields, logp.data_ptr(), lse.data_ptr(), _address(entropy), torch.get_num_threads())
    del keep
    return logp, lse, entropy


def log_probs_backward(
    logits2d: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write d loss / d logits to ``out``, which may be ``logits2d`` itself. ``entropy`` is that of the forward."""
    assert out.dtype == logits2d.dtype and out.shape == logits2d.shape and _is_rows(out)
    fields, keep = _row_fields(logits2d, ids, mask, temperature)
    columns = [
        None if column is None else _dense(column, torch.float32, logits2d.shape[0])
        for column in (lse, entropy, grad_logp, grad_entropy)
    ]
    addresses = [_address(column) for column in columns]
    _C.log_probs_backward(*fields, *addresses, out.data_ptr(), out.stride(0), torch.get_num_threads())
    del keep


def segment_scan(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """y_t = x_t + gamma * y_{t-1} (y_{t+1} if ``reverse``) inside each segment of ``values``."""
    assert cu_seqlens.ndim == 1 and cu_seqlens.numel() > 0
    values = _dense(values, torch.float32, values.numel())
    cu_seqlens = _dense(cu_seqlens, torch.int64, cu_seqlens.numel())
    out = torch.empty_like(values)
    _C.segment_scan(
        values.data_ptr(),
        cu_seqlens.data_ptr(),
        cu_seqlens.numel() - 1,
        values.numel(),
        gamma,
        reverse,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _row_fields(
    logits2d: Tensor, ids: Tensor, mask: Tensor | None, temperature: float
) -> tuple[tuple[int | float, ...], tuple[Tensor | None, ...]]:
    """The leading arguments of both log_probs kernels, and the tensors that must outlive the call."""
    assert _is_rows(logits2d) and logits2d.device.type == "cpu"
    rows, columns = logits2d.shape
    ids = _dense(ids, torch.int64, rows)
    if mask is not None:
        # A bool is one byte of 0 or 1: reinterpret it rather than copy.
        mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        mask = _dense(mask, torch.uint8, rows)
    fields = (
        logits2d.data_ptr(),
        logits2d.stride(0),
        _DTYPES[logits2d.dtype],
        ids.data_ptr(),
        _address(mask),
        rows,
        columns,
        temperature,
    )
    return fields, (logits2d, ids, mask)


def _is_rows(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and (tensor.stride(1) == 1 or tensor.shape[1] == 1)


def _dense(tensor: Tensor, dtype: torch.dtype, size: int) -> Tensor:
    assert tensor.dtype == dtype and tensor.numel() == size and tensor.device.type == "cpu"
    return tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
