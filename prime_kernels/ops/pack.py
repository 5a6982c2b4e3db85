"""Padded rows to packed tokens and back.

pack:    y_t = x[r, c], where token t is token t - cu_seqlens[r] of row r and c counts from the row's first token
unpack:  x[r, c] = y_t at the same positions, and the fill elsewhere

Each is the gradient of the other.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._segment_math import segment_index

PADDINGS = ("right", "left")


def reference_pack(padded: Tensor, cu_seqlens: Tensor, total: int, pad_left: bool) -> Tensor:
    """[total, ...] from [B, L, ...]."""
    row = segment_index(cu_seqlens, total)
    column = torch.arange(total, dtype=torch.int64, device=padded.device) - cu_seqlens[row]
    if pad_left:
        column = column + padded.shape[1] - cu_seqlens.diff()[row]
    return padded[row, column]


def reference_unpack(values: Tensor, cu_seqlens: Tensor, length: int, pad_left: bool, fill: float) -> Tensor:
    """[B, length, ...] from [N, ...]."""
    lengths = cu_seqlens.diff()[:, None]
    column = torch.arange(length, dtype=torch.int64, device=values.device)[None]
    column = column - (length - lengths) if pad_left else column.expand(lengths.shape[0], length)
    inside = (column >= 0) & (column < lengths)
    shape = (*inside.shape, *values.shape[1:])
    # Made on the CPU, where a fill beyond the range of the dtype becomes infinite.
    blank = torch.tensor(fill, dtype=values.dtype, device="cpu").to(values.device)
    if values.shape[0] == 0:
        return blank.expand(shape).clone()
    found = values[(cu_seqlens[:-1, None] + column).clamp(0, values.shape[0] - 1)]
    return found.where(inside.reshape(*inside.shape, *[1] * (values.ndim - 1)), blank)


class PackRows(torch.autograd.Function):
    """Packed tokens [total, W] of padded rows [B, L, W] on a backend."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, cu_seqlens: Tensor, total: int, pad_left: bool, backend: str) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.length, ctx.pad_left, ctx.backend = padded.shape[1], pad_left, backend
        return _backends.packed(backend).pack_tokens(padded, cu_seqlens, total, pad_left)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (cu_seqlens,) = ctx.saved_tensors
        padded = UnpackTokens.apply(grad, cu_seqlens, ctx.length, ctx.pad_left, 0, ctx.backend)
        return padded, None, None, None, None


class UnpackTokens(torch.autograd.Function):
    """Padded rows [B, length, W] of packed tokens [N, W] on a backend."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, cu_seqlens: Tensor, length: int, pad_left: bool, fill: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(cu_seqlens)
        ctx.total, ctx.pad_left, ctx.backend = values.shape[0], pad_left, backend
        return _backends.packed(backend).unpack_tokens(values, cu_seqlens, length, pad_left, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (cu_seqlens,) = ctx.saved_tensors
        return PackRows.apply(grad, cu_seqlens, ctx.total, ctx.pad_left, ctx.backend), None, None, None, None, None


def pack(
    padded: Tensor,
    cu_seqlens: Tensor,
    *,
    total: int | None = None,
    padding: str = "right",
    backend: str | None = None,
) -> Tensor:
    """The tokens of padded rows, end to end. Differentiable in ``padded``.

    Args:
        padded: [B, L] or [B, L, ...], any dtype of at most 8 bytes per element.
        cu_seqlens: [B + 1], int32 or int64: where rows start when packed, from 0, non-decreasing, with no row longer
            than L. Of a mask [B, L]: ``torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))``.
        total: the number of tokens, which ``cu_seqlens`` ends at; None reads it, waiting for the device once.
        padding: which side of a row the padding is on: "right", or "left" as for prompts.
        backend: see :mod:`prime_kernels`.

    Returns:
        [total] or [total, ...], the dtype of ``padded``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, bad offsets, a row longer than L, an unknown padding.
        BackendUnavailable: the backend asked for cannot run this.

    Source: the packed layout of flash-attn's variable-length attention.
    """
    _check_copied("padded", padded, 2)
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, _checks.size("total", total), "tokens", padded, "padded")
    _checks.shape("padded", padded, (cu_seqlens.numel() - 1, *padded.shape[1:]), "the rows of cu_seqlens")
    _checks.choice("padding", padding, PADDINGS)
    _checks.longest("cu_seqlens", cu_seqlens, padded.shape[1], "the columns of padded")
    total = int(cu_seqlens[-1]) if total is None else total
    chosen, pad_left = _dispatch.resolve("pack", padded, backend), padding == "left"
    if chosen == "eager" or 0 in padded.shape[2:]:
        return reference_pack(padded, cu_seqlens, total, pad_left)
    rows, length = padded.shape[:2]
    flat = padded.reshape(rows, length, math.prod(padded.shape[2:]))
    return PackRows.apply(flat, cu_seqlens, total, pad_left, chosen).reshape(total, *padded.shape[2:])


def unpack(
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    length: int | None = None,
    padding: str = "right",
    fill: float = 0,
    backend: str | None = None,
) -> Tensor:
    """Packed tokens as padded rows. Differentiable in ``values``.

    Args:
        values: [T] or [T, ...], any dtype of at most 8 bytes an element.
        cu_seqlens: [B + 1], int32 or int64: where rows start, from 0, non-decreasing, ending at T.
        length: columns of the result, at least the longest row; None takes the longest, waiting for the device once.
        padding: which side of a row the padding is on, "right" or "left".
        fill: what the padding holds; a whole number for integer values.
        backend: see :mod:`prime_kernels`.

    Returns:
        [B, length] or [B, length, ...], the dtype of ``values``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, bad offsets, a row longer than ``length``, an unknown padding, a fill that
            the dtype cannot hold.
        BackendUnavailable: the backend asked for cannot run this.

    Source: the packed layout of flash-attn's variable-length attention.
    """
    _check_copied("values", values, 1)
    cu_seqlens = _checks.offsets("cu_seqlens", cu_seqlens, values.shape[0], "tokens", values, "values")
    _checks.choice("padding", padding, PADDINGS)
    if isinstance(fill, Tensor) or not isinstance(fill, (int, float)):
        raise TypeError(f"fill: expected a number, got {type(fill).__name__}")
    if not (values.is_floating_point() or values.is_complex()):
        if not math.isfinite(fill) or fill != int(fill):
            raise ValueError(f"fill: expected a whole number for {values.dtype} values, got {fill}")
        low, high = (
            (0, 1) if values.dtype == torch.bool else (torch.iinfo(values.dtype).min, torch.iinfo(values.dtype).max)
        )
        if not low <= fill <= high:
            raise ValueError(f"fill: expected a value of {values.dtype}, in [{low}, {high}], got {fill}")
    length = _checks.size("length", length)
    if length is None:
        length = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    else:
        _checks.longest("cu_seqlens", cu_seqlens, length, "length")
    chosen, pad_left = _dispatch.resolve("unpack", values, backend), padding == "left"
    if chosen == "eager" or 0 in values.shape[1:]:
        return reference_unpack(values, cu_seqlens, length, pad_left, fill)
    flat = values.reshape(values.shape[0], math.prod(values.shape[1:]))
    padded = UnpackTokens.apply(flat, cu_seqlens, length, pad_left, fill, chosen)
    return padded.reshape(cu_seqlens.numel() - 1, length, *values.shape[1:])


def _check_copied(name: str, value: object, dimensions: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.element_size() > 8:
        raise TypeError(f"{name}: expected a dtype of at most 8 bytes an element, got {value.dtype}")
    if value.ndim < dimensions:
        raise ValueError(f"{name}: expected at least {dimensions} dimensions, got shape {list(value.shape)}")
