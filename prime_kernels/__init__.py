"""Operations for training with implicit process rewards (PRIME), on packed tokens.

Sequences are packed end to end: token tensors are ``[T]`` and ``cu_seqlens`` ``[B + 1]`` (int32 or int64) holds the
offsets at which they start, with ``cu_seqlens[0] == 0`` and ``cu_seqlens[-1] == T``. Log-probabilities, rewards,
returns and losses are float32; float64 inputs are computed and returned in float64.

Every function takes ``backend``: ``None`` (the fastest that can run), ``"eager"`` (plain PyTorch, the readable
reference), ``"cpu"``, ``"triton"`` or ``"cuda"``. See :func:`use_backend` and :func:`available_backends`.
"""

from prime_kernels._dispatch import BackendUnavailable, available_backends, use_backend
from prime_kernels.ops import _custom_ops as _custom_ops
from prime_kernels.ops.candidates import Candidates, candidates, distribution_ppo_loss
from prime_kernels.ops.linear_log_probs import Head, linear_log_probs
from prime_kernels.ops.linear_log_ratios import linear_log_ratios
from prime_kernels.ops.linear_losses import linear_nll, linear_ppo_loss
from prime_kernels.ops.log_probs import log_probs
from prime_kernels.ops.log_ratios import LogRatios, log_ratios
from prime_kernels.ops.pack import pack, unpack
from prime_kernels.ops.ppo_loss import PPOLoss, ppo_loss
from prime_kernels.ops.prm_loss import PRMLoss, prm_loss
from prime_kernels.ops.rloo_advantages import Advantages, rloo_advantages
from prime_kernels.ops.segment_scan import segment_scan
from prime_kernels.ops.segment_sum import segment_sum
from prime_kernels.ops.step_rewards import step_rewards

__version__ = "0.1.0"

__all__ = [
    "Advantages",
    "BackendUnavailable",
    "Candidates",
    "Head",
    "LogRatios",
    "PPOLoss",
    "PRMLoss",
    "available_backends",
    "candidates",
    "distribution_ppo_loss",
    "linear_log_probs",
    "linear_log_ratios",
    "linear_nll",
    "linear_ppo_loss",
    "log_probs",
    "log_ratios",
    "pack",
    "ppo_loss",
    "prm_loss",
    "rloo_advantages",
    "segment_scan",
    "segment_sum",
    "step_rewards",
    "unpack",
    "use_backend",
]
