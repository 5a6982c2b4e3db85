"""The product of a head with the softmax in its epilogue, in place of a library's product and row kernels.

By calculation it saves a GPU the reading of logits, and the writing where they are not kept, but no one has measured
it: only "triton" has it, and only where a tuning file has "fused_columns", columns of a tile. Whether a head goes
through it depends on the head and the backend alone: results do not change with a gradient or with memory.
"""

from torch import Tensor

from prime_kernels import _tuning
from prime_kernels._backends import LinearHead, RowResults


def columns(head: LinearHead, backend: str, device_type: str) -> int | None:
    """Columns of a tile; None if a library multiplies."""
    size = _tuning.tile("fused_columns", device_type, 0) if backend == "triton" else 0
    if not size:
        return None
    from prime_kernels._triton import head as kernels

    return size if kernels.supported(head) else None


def log_probs(head: LinearHead, with_entropy: bool, columns: int, out: Tensor | None = None) -> RowResults:
    """Results [N], and all logits [N, V] to ``out`` if it is given."""
    from prime_kernels._triton import head as kernels

    return kernels.token_log_probs(head, with_entropy, columns, out)


def logits(head: LinearHead, tokens: slice, part: slice, columns: int, out: Tensor) -> Tensor:
    """The logits of some tokens and part of the vocabulary to ``out``: the bits of those of :func:`log_probs`."""
    from prime_kernels._triton import head as kernels

    bias = None if head.bias is None else head.bias[part]
    of_part = head._replace(hidden=head.hidden[tokens], weight=head.weight[part], bias=bias, ids=head.ids[tokens])
    kernels.logits(of_part, out, columns)
    return out
