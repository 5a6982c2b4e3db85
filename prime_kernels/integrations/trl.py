"""TRL on these kernels: log-probs, entropies, and the fused LM head that GRPO, RLOO, DPO and KTO train through.

    from prime_kernels.integrations import trl
    trl.patch()                         # or logits_dtype="input", to round logits as the model's own head does

Where there is a GPU, what TRL has Triton kernels for stays in place; ``patch(replace_fused=True)`` replaces it, too.
ZeRO-3, devices other than CPU and CUDA, and the outputs that only SFT asks for stay on TRL's own code. Results are
float32 also for 16-bit logits, where TRL's eager code rounds them to 16 bits. TRL 1.14 and older have no fused LM head;
there the functions on logits are replaced, and logits come as the model's own head has rounded them.
"""

from typing import Any

import torch
from torch import Tensor

from prime_kernels.integrations import _logits
from prime_kernels.integrations._heads import head_log_probs
from prime_kernels.integrations._patching import Integration, Patched, Target, exists, function_target
from prime_kernels.integrations.causal_head import CausalHead
from prime_kernels.ops.linear_log_probs import check_logits_dtype
from prime_kernels.ops.log_probs import log_probs

__all__ = ["entropy_from_logits", "patch", "selective_log_softmax", "selective_log_softmax_and_entropy", "unpatch"]


_logits_dtype = "float32"
"""Of the fused LM head, as the last :func:`patch` has it."""


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """``(logits / temperature).log_softmax(-1)`` at ``index``, as ``trl.trainer.utils`` has it.

    Args:
        logits: [..., V].
        index: [...], or [..., K] for K tokens a row.
        temperature: above 0.
        row_mask: the shape of ``index``; rows with a 0 are skipped and give 0.

    Returns:
        The shape of ``index``, float32 (float64 for float64 logits).
    """
    if index.ndim == logits.ndim - 1:
        return log_probs(logits, index, mask=_as_bool(row_mask), temperature=temperature)
    scaled = (logits.double() if logits.dtype == torch.float64 else logits.float()) / temperature
    found = scaled.gather(-1, index) - scaled.logsumexp(-1, keepdim=True)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of each row of ``logits`` [..., V], in nats, float32; ``chunk_size`` is of no effect."""
    return _logits.entropy(logits)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both of the above in one pass over the logits [..., V], for ``index`` [...]."""
    logp, entropy = log_probs(logits, index, mask=_as_bool(row_mask), temperature=temperature, with_entropy=True)
    return logp, entropy if entropy_requires_grad else entropy.detach()


def _as_bool(row_mask: Tensor | None) -> Tensor | None:
    return None if row_mask is None else row_mask != 0


def _chunked_log_prob(original: Any) -> Any:
    """TRL's autograd function on hidden states, with ``original`` for what linear_log_probs has not."""

    class ChunkedLogProbFunction:
        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor | None, ...]:
            extra = set(outputs) - {"log_probs", "entropy"}
            # ZeRO-3 gathers the weight around TRL's forward and backward alone.
            elsewhere = hidden.device.type not in ("cpu", "cuda") or hasattr(weight, "ds_id")
            if extra or elsewhere or not logit_scale > 0:
                arguments = (hidden, weight, bias, targets, temperature, chunk_size)
                return original.apply(*arguments, final_logit_softcapping, logit_scale, outputs)
            logp, entropy = head_log_probs(
                hidden,
                weight,
                bias,
                targets,
                temperature=temperature,
                with_entropy="entropy" in outputs,
                logits_dtype=_logits_dtype,
                head=CausalHead(logit_scale, final_logit_softcapping),
            )
            return logp, entropy, None, None, None

    return ChunkedLogProbFunction


def _triton_kernel() -> str | None:
    """TRL from 1.15 has Triton kernels, where triton can be imported."""
    return "on CUDA TRL runs a Triton kernel of its own" if exists("trl.kernels") and exists("triton") else None


_UTILS = "trl.trainer.utils"
_INTEGRATION = Integration(
    package="trl",
    versions="0.24 to 1.16",
    tested="1.16.0",
    namespaces=("trl",),
    targets=(
        function_target(
            _UTILS,
            selective_log_softmax,
            "logits, index",
            "logits, index, temperature=1.0, row_mask=None",
        ),
        function_target(_UTILS, entropy_from_logits, "logits, chunk_size=128"),
        function_target(
            _UTILS,
            selective_log_softmax_and_entropy,
            "logits, index, entropy_requires_grad=True, temperature=1.0, row_mask=None",
            optional=True,
            fused=_triton_kernel,
        ),
        Target(
            "trl.kernels.chunked_logprob",
            "ChunkedLogProbFunction",
            _chunked_log_prob,
            (
                "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping=None, "
                "logit_scale=1.0, outputs=('entropy', 'log_sum_sq_probs', 'mean_logits', 'is_top1')",
            ),
            optional=True,
            fused=_triton_kernel,
        ),
    ),
)


def patch(*, logits_dtype: str = "float32", replace_fused: bool = False) -> Patched:
    """Replace TRL's functions by these; returns and logs what was replaced and what was left. The last call holds.

    Args:
        logits_dtype: of the fused LM head, "float32" or "input", as in :func:`prime_kernels.linear_log_probs`; "input"
            rounds to the dtype of the hidden states, or of autocast, as the model's own head does.
        replace_fused: where there is a GPU, also replace what TRL has Triton kernels for: the fused LM head and
            ``selective_log_softmax_and_entropy``.

    Raises:
        IntegrationError: TRL is not installed, or of a version whose functions have changed.
        ValueError: another logits_dtype.
    """
    global _logits_dtype
    check_logits_dtype(logits_dtype)
    done = _INTEGRATION.patch(replace_fused=replace_fused)
    _logits_dtype = logits_dtype
    return done


def unpatch() -> None:
    """Put TRL's own functions back; without a patch, nothing happens."""
    _INTEGRATION.unpatch()
