"""Launches of pack and unpack on checked tensors."""

import torch
from torch import Tensor

from prime_kernels._triton._launch import offsets, on_device
from prime_kernels._triton._launch_config import PackConfig, choose_pack
from prime_kernels._triton._pack_kernels import pack_kernel, unpack_kernel

# Elements of any dtype are copied as integers of the same size.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_tokens(
    padded: Tensor, cu_seqlens: Tensor, total: int, pad_left: bool, config: PackConfig | None = None
) -> Tensor:
    """[total, W] of [B, L, W] padded on the right, or with ``pad_left`` on the left, in one launch."""
    rows, length, width = padded.shape
    device = padded.device
    cu_seqlens, _ = offsets(cu_seqlens, device)
    out = padded.new_empty(total, width)
    if total == 0 or width == 0:
        return out
    config = config or choose_pack(width)
    with on_device(device):
        pack_kernel[_grid(total, width, config)](
            _integers(padded.contiguous()),
            cu_seqlens,
            _integers(out),
            total,
            rows,
            length,
            width,
            LEFT=pad_left,
            TOKENS=config.tokens,
            WIDTH=config.width,
            num_warps=config.num_warps,
        )
    return out


def unpack_tokens(
    values: Tensor,
    cu_seqlens: Tensor,
    length: int,
    pad_left: bool,
    fill: bool | int | float,
    config: PackConfig | None = None,
) -> Tensor:
    """[B, length, W] of [N, W], padded with ``fill`` on the right, or with ``pad_left`` on the left, in one launch."""
    width, device = values.shape[1], values.device
    cu_seqlens, rows = offsets(cu_seqlens, device)
    out = values.new_empty(rows, length, width)
    if out.numel() == 0:
        return out
    config = config or choose_pack(width)
    # The bits of the fill are computed on the CPU, without waiting for the device.
    bits = _integers(torch.tensor(fill, dtype=values.dtype, device="cpu")).item()
    with on_device(device):
        unpack_kernel[_grid(rows * length, width, config)](
            _integers(values.contiguous()),
            cu_seqlens,
            _integers(out),
            rows * length,
            length,
            width,
            bits,
            LEFT=pad_left,
            TOKENS=config.tokens,
            WIDTH=config.width,
            num_warps=config.num_warps,
        )
    return out


def _integers(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.element_size()])


def _grid(tokens: int, width: int, config: PackConfig) -> tuple[int, int]:
    return -(-tokens // config.tokens), -(-width // config.width)
