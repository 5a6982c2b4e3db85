"""The product of a head with the softmax in its epilogue, in place of a library's product and row kernels.

By calculation it saves a GPU the reading of logits, and the writing where they are not kept, but no one has measured
it: only "triton" has it, and only where a tuning file has "fused_columns", columns of a tile. Whether a head goes
through it depends on the head and the backend alone: results do not change with a gradient or with memory.

For the gradient of a bfloat16 head without a bias its logits are not stored: what is, and is overwritten with the
gradient, are probabilities in float16 relative to the largest of a row in a tile, half the memory and the traffic of
float32 logits. Their rounding of 2^-11 disappears beside the gradient's own of 2^-8. A bias wants float32 sums of the
gradient, and its registers would spill.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prime_kernels import _tuning
from prime_kernels._backends import LinearHead, RowGradient, RowResults
from prime_kernels.ops._tile_shapes import up_to

if TYPE_CHECKING:
    from prime_kernels._triton.head import Probabilities


def columns(head: LinearHead, backend: str, device_type: str) -> int | None:
    """Columns of a tile; None if a library multiplies."""
    size = _tuning.tile("fused_columns", device_type, 0) if backend == "triton" else 0
    if not size:
        return None
    from prime_kernels._triton import head as kernels

    return size if kernels.supported(head) else None


def for_gradient(head: LinearHead, backend: str, device_type: str) -> int | None:
    """Columns of a tile of :class:`Probabilities`; None if the gradient is made of logits."""
    plain = head.hidden.dtype == torch.bfloat16 and head.bias is None and head.ids.ndim == 1
    return columns(head, backend, device_type) if plain else None


def log_probs(head: LinearHead, with_entropy: bool, columns: int, out: Tensor | None = None) -> RowResults:
    """Results [N], and all logits [N, V] to ``out`` if it is given."""
    from prime_kernels._triton import head as kernels

    return kernels.token_log_probs(head, with_entropy, columns, out)[0]


def log_probs_and_kept(
    head: LinearHead, with_entropy: bool, columns: int, q: Tensor
) -> tuple[RowResults, tuple[Tensor, ...]]:
    """Results [N], and the tensors of :class:`Probabilities`, the first of them ``q``. No id may lie outside."""
    from prime_kernels._triton import head as kernels

    results, highest = kernels.token_log_probs(head, with_entropy, columns, q=q)
    return results, (q, highest)


def logits(head: LinearHead, tokens: slice, part: slice, columns: int, out: Tensor) -> Tensor:
    """The logits of some tokens and part of the vocabulary to ``out``: the bits of those of :func:`log_probs`."""
    from prime_kernels._triton import head as kernels

    kernels.logits(_part(head, tokens, part), out, columns)
    return out


def empty_q(head: LinearHead, n_tokens: int, n_columns: int, columns: int) -> Tensor:
    """Uninitialised probabilities [n_tokens, n_columns]; the memory of a row has whole tiles."""
    return head.hidden.new_empty(n_tokens, up_to(n_columns, columns), dtype=torch.float16)[:, :n_columns]


class OfProbabilities:
    """Gradients of tiles of logits in bfloat16, from kept :class:`Probabilities` or new ones: the same bits."""

    def __init__(
        self, head: LinearHead, logp: Tensor, gradient: RowGradient, columns: int, kept: tuple[Tensor, ...]
    ) -> None:
        from prime_kernels._triton import head as kernels

        self.head, self.logp, self.rows, self.columns, self.kernels = head, logp, gradient, columns, kernels
        self.kept: Probabilities | None = kernels.Probabilities(*kept) if kept else None

    def __call__(self, tokens: slice, part: slice) -> Tensor:
        """That of some tokens and part of the vocabulary, which starts at a tile. What was kept of it is gone."""
        head = _part(self.head, tokens, part)
        head = head._replace(ids=head.ids - part.start)
        if self.kept is None:
            q = empty_q(head, len(head.hidden), len(head.weight), self.columns)
            found = self.kernels.probabilities(head, q, self.columns)
        else:
            found = self.kept.of(tokens, part, self.columns)
        of_rows = self.rows.rows(tokens)
        return self.kernels.gradient(found, head.ids, self.logp[tokens], of_rows, head.temperature, self.columns)


def _part(head: LinearHead, tokens: slice, part: slice) -> LinearHead:
    bias = None if head.bias is None else head.bias[part]
    return head._replace(hidden=head.hidden[tokens], weight=head.weight[part], bias=bias, ids=head.ids[tokens])
