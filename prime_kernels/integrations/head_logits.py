"""Logits of an output layer for what samples: those that the linear operations make log-probs from."""

import torch
from torch import Tensor

from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops.linear_log_probs import check


@torch.no_grad()
def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """The float32 sums of ``hidden @ weight.T + bias``, never rounded to 16 bits; not differentiable.

    Of 16-bit inputs on CPUs by the kernels of whole heads: in a third of the time of a float32 product of converted
    weights, though not quite in that of a rounded product.

    Args:
        hidden: [..., D], float32, bfloat16 or float16; float64 on "eager".
        weight: [V, D], in the dtype of ``hidden``.
        bias: [V], in that dtype, or None.
        backend: as in :func:`prime_kernels.linear_log_probs`.

    Returns:
        [..., V], float32 (float64 for float64 inputs).

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
        BackendUnavailable: the backend asked for cannot run this.
    """
    ids = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    head, ids, settings = check(hidden, weight, ids, bias, None, 1.0, None, False, "float32", backend)
    rows = settings.of_product(head.hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, ids.reshape(-1))
    return tiles.all_logits(rows, settings.backend).view(*hidden.shape[:-1], len(weight))
