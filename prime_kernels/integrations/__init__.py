"""One line that makes another trainer use these kernels.

``prime_kernels.integrations.trl.patch()``, and the same of ``verl``, ``openrlhf`` and ``skyrl``, replaces the log-prob,
entropy and advantage functions of that trainer; ``unpatch()`` puts them back. Where there is a GPU, fused kernels of
the trainer's own stay in place unless ``patch(replace_fused=True)``; the :class:`Patched` that comes back says which.
Each module also has these functions under the names and signatures of that trainer, to import instead of its own.
:class:`LogProbHead` scores tokens with any Hugging Face model without making its logits; :func:`causal_head` says how
its logits follow from its last hidden states, :func:`tile_sizes` how many of them exist at once. :func:`head_logits`
makes them for an engine that samples.

The trainers are imported when ``patch()`` is called, never before.
"""

from prime_kernels.integrations._patching import IntegrationError, Patched
from prime_kernels.integrations.causal_head import CausalHead, causal_head, output_layer
from prime_kernels.integrations.head_logits import head_logits
from prime_kernels.integrations.log_prob_head import LogProbHead
from prime_kernels.integrations.tile_sizes import TileSizes, tile_sizes

__all__ = [
    "CausalHead",
    "IntegrationError",
    "LogProbHead",
    "Patched",
    "TileSizes",
    "causal_head",
    "head_logits",
    "output_layer",
    "tile_sizes",
]
