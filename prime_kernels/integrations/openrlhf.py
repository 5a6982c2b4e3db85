"""OpenRLHF on these kernels: the log-probs and entropies of its actor.

    from prime_kernels.integrations import openrlhf
    openrlhf.patch()

Call it in every process that makes an ``Actor`` (a Ray worker imports the package for itself). Results are float32 also
for 16-bit logits; logits are never changed, where OpenRLHF divides them by the temperature in place.
Where there is a GPU, what OpenRLHF runs a fused kernel for stays in place: log-probs where flash-attn is installed, and
the entropy, which it compiles. ``patch(replace_fused=True)`` replaces them, too.
"""

from torch import Tensor

from prime_kernels.integrations import _logits
from prime_kernels.integrations._patching import Integration, Patched, function_target, kernel_of
from prime_kernels.ops.log_probs import log_probs

__all__ = ["compute_entropy", "log_probs_from_logits", "patch", "unpatch"]


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities [...] of ``labels`` [...] under softmax(logits / temperature), logits [..., V]; float32."""
    return log_probs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy [...] of each row of ``logits`` [..., V], in nats; float32."""
    return _logits.entropy(logits)


_UTILS = "openrlhf.models.utils"
_INTEGRATION = Integration(
    package="openrlhf",
    versions="0.8.11 to 0.11.2",
    tested="0.11.2",
    namespaces=("openrlhf",),
    targets=(
        function_target(
            _UTILS,
            log_probs_from_logits,
            "logits, labels, temperature=1.0",
            fused=kernel_of("flash_attn", "on CUDA OpenRLHF runs flash-attn's cross-entropy"),
        ),
        function_target(
            _UTILS, compute_entropy, "logits", fused=lambda: "OpenRLHF has it compiled, to a fused kernel on CUDA"
        ),
    ),
)


def patch(*, replace_fused: bool = False) -> Patched:
    """Replace OpenRLHF's functions by these; returns and logs what was replaced and what was left. The last call holds.

    Args:
        replace_fused: where there is a GPU, also replace what OpenRLHF has a fused kernel for.

    Raises:
        IntegrationError: OpenRLHF cannot be imported, or is of a version whose functions have changed.
    """
    return _INTEGRATION.patch(replace_fused=replace_fused)


def unpatch() -> None:
    """Put OpenRLHF's own functions back; without a patch, nothing happens."""
    _INTEGRATION.unpatch()
