"""linear_log_probs of hidden states and an output layer in the dtypes that trainers keep them in."""

import torch
from torch import Tensor

from prime_kernels.integrations.causal_head import CausalHead
from prime_kernels.ops.linear_log_probs import linear_log_probs

PLAIN = CausalHead()


def head_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float,
    with_entropy: bool,
    logits_dtype: str,
    head: CausalHead = PLAIN,
) -> tuple[Tensor, Tensor | None]:
    """(logp, entropy or None) of :func:`prime_kernels.linear_log_probs` in the dtype of autocast, or of ``hidden``,
    to which ``logits_dtype`` "input" rounds the logits.

    As in any layer under autocast, the gradient of a float32 ``weight`` is rounded to the lower dtype once.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast and hidden.dtype != torch.float64 else hidden.dtype
    hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(device, enabled=False):
        found = linear_log_probs(
            hidden, weight, ids, bias=bias, mask=mask, with_entropy=with_entropy, logits_dtype=logits_dtype,
            **head.options(temperature),
        )  # fmt: skip
    return (found, None) if isinstance(found, Tensor) else found
