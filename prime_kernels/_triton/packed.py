"""The Triton kernels over packed tokens, as :class:`prime_kernels._backends.GpuPackedKernels` names them."""

from prime_kernels._triton.losses import ppo_backward, ppo_forward, prm_forward
from prime_kernels._triton.pack import pack, unpack
from prime_kernels._triton.rloo import rloo_returns, whiten
from prime_kernels._triton.segments import segment_fill, segment_scan, segment_sum

__all__ = [
    "pack",
    "ppo_backward",
    "ppo_forward",
    "prm_forward",
    "rloo_returns",
    "segment_fill",
    "segment_scan",
    "segment_sum",
    "unpack",
    "whiten",
]
