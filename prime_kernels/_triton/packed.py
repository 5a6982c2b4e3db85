"""The Triton kernels over packed tokens, as :class:`prime_kernels._backends.GpuPackedKernels` names them."""

from prime_kernels._triton.losses import ppo_gradient, ppo_loss_and_scale, prefix_loss_and_slope, prm_loss_and_slope
from prime_kernels._triton.pack import pack_tokens, unpack_tokens
from prime_kernels._triton.rloo import checked_batch, rloo_returns, whiten
from prime_kernels._triton.segments import fill_segments, scan_segments, sum_segments

__all__ = [
    "checked_batch",
    "fill_segments",
    "pack_tokens",
    "ppo_gradient",
    "ppo_loss_and_scale",
    "prefix_loss_and_slope",
    "prm_loss_and_slope",
    "rloo_returns",
    "scan_segments",
    "sum_segments",
    "unpack_tokens",
    "whiten",
]
