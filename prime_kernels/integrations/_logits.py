"""Functions of logits that several trainers' functions are made of."""

import torch
from torch import Tensor

from prime_kernels.ops.log_probs import log_probs


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each row of [..., V], in nats: float32, or float64 for float64 logits."""
    ids = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return log_probs(logits, ids, with_entropy=True)[1]


def can_be_overwritten(logits: Tensor) -> bool:
    """Whether inplace_backward takes these logits: dense rows that do not overlap, and not a leaf of the graph."""
    overlap = any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape, strict=True))
    return logits.stride(-1) == 1 and not overlap and not logits.is_leaf


def verl_log_probs(logits: Tensor, labels: Tensor, inplace_backward: bool) -> Tensor:
    """What verl and SkyRL, which has it from verl, mean by ``inplace_backward``: where it can be done."""
    return log_probs(logits, labels, inplace_backward=bool(inplace_backward) and can_be_overwritten(logits))
