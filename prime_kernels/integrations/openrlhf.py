"""OpenRLHF on these kernels: the log-probs and entropies of its actor.

    from prime_kernels.integrations import openrlhf
    openrlhf.patch()

Call it in every process that makes an ``Actor`` (a Ray worker imports the package for itself). Results are float32 also
for 16-bit logits; logits are never changed, where OpenRLHF divides them by the temperature in place.
"""

from torch import Tensor

from prime_kernels.integrations import _logits
from prime_kernels.integrations._patching import Integration, function_target
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
        function_target(_UTILS, log_probs_from_logits, "logits, labels, temperature=1.0"),
        function_target(_UTILS, compute_entropy, "logits"),
    ),
)


def patch() -> None:
    """Replace OpenRLHF's functions by these. A second call changes nothing.

    Raises:
        IntegrationError: OpenRLHF cannot be imported, or is of a version whose functions have changed.
    """
    _INTEGRATION.patch()


def unpatch() -> None:
    """Put OpenRLHF's own functions back; without a patch, nothing happens."""
    _INTEGRATION.unpatch()
