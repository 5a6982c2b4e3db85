"""SkyRL on these kernels: the log-probs and entropies of its model wrapper.

    from prime_kernels.integrations import skyrl
    skyrl.patch()

Call it in every worker process, before models are wrapped: they keep, or compile, the entropy function that they find.
Results are float32 also for 16-bit logits. Megatron workers have functions of their own, which stay. Where there is a
GPU, ``logprobs_from_logits`` stays SkyRL's if flash-attn is installed; ``patch(replace_fused=True)`` replaces it, too.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from prime_kernels.integrations import _logits
from prime_kernels.integrations._patching import Integration, Patched, function_target, kernel_of
from prime_kernels.ops.log_probs import log_probs

__all__ = ["chunked_entropy_from_logits", "logprobs_from_logits", "logprobs_from_logits_v2", "patch", "unpatch"]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probabilities [...] of ``labels`` [...] under softmax(logits), logits [..., V].

    ``inplace_backward`` lets backward write the gradient over the logits, as SkyRL has it with flash-attn; logits that
    are leaves of the graph, or whose rows are not dense, are left alone all the same.
    """
    return _logits.verl_log_probs(logits, labels, inplace_backward)


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """As :func:`logprobs_from_logits`; the logits are kept."""
    return log_probs(logits, labels)


def chunked_entropy_from_logits(
    logits: Tensor, requires_grad: bool = False, attention_mask: Tensor | None = None, chunk_size: int = 1024
) -> Tensor:
    """Entropy [B, L] of each row of ``logits`` [B, L, V], in nats; float32.

    Args:
        logits: [B, L, V].
        requires_grad: record a graph.
        attention_mask: [B, L], 0 where the entropy is to be 0, or None.
        chunk_size: of no effect, as no softmax is held.

    Raises:
        ValueError: a mask of another shape.
    """
    if attention_mask is not None and attention_mask.shape != logits.shape[:2]:
        raise ValueError(f"attention_mask: expected shape {[*logits.shape[:2]]}, got {[*attention_mask.shape]}")
    with nullcontext() if requires_grad else torch.no_grad():
        found = _logits.entropy(logits)
        return found if attention_mask is None else found * attention_mask


_UTILS = "skyrl.backends.skyrl_train.utils.torch_utils"
_INTEGRATION = Integration(
    package="skyrl",
    versions="0.3.0 and 0.4.0",
    tested="0.3.0 and 0.4.0",
    namespaces=("skyrl",),
    targets=(
        function_target(
            _UTILS,
            logprobs_from_logits,
            "logits, labels, inplace_backward=True",
            fused=kernel_of("flash_attn", "on CUDA SkyRL runs flash-attn's cross-entropy"),
        ),
        function_target(_UTILS, logprobs_from_logits_v2, "logits, labels"),
        function_target(
            _UTILS,
            chunked_entropy_from_logits,
            "logits, requires_grad=False, attention_mask=None, chunk_size=1024",
        ),
    ),
)


def patch(*, replace_fused: bool = False) -> Patched:
    """Replace SkyRL's functions by these; returns and logs what was replaced and what was left. The last call holds.

    Args:
        replace_fused: where there is a GPU, also replace ``logprobs_from_logits`` where flash-attn is installed, whose
            cross-entropy SkyRL runs.

    Raises:
        IntegrationError: SkyRL cannot be imported, or is of a version whose functions have changed.
    """
    return _INTEGRATION.patch(replace_fused=replace_fused)


def unpatch() -> None:
    """Put SkyRL's own functions back; without a patch, nothing happens."""
    _INTEGRATION.unpatch()
