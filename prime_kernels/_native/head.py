"""Output layers on CPUs in C++: log-probs of hidden states, and gradients, from float32 logits that stay in cache.

The microkernels multiply packed operands with float32 accumulators and take the softmax of a tile from there. Each
logit is summed over the width in one fixed order, each token's softmax over the vocabulary in another; neither depends
on other tokens or on the number of threads. Log-probs and entropies have the same bits whatever else is in the call.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels import _native
from prime_kernels._backends import LinearHead, RowGradient, RowResults
from prime_kernels._layout import column
from prime_kernels._native import DTYPES, address, run

CPU = torch.device("cpu")


def kept_logits(head: LinearHead) -> Tensor:
    """Room for the float32 logits of all tokens, in the order that suits the kernels."""
    tokens, depth = head.hidden.shape
    sizes = {"n_tokens": tokens, "n_vocabulary": len(head.weight), "depth": depth, "dtype": DTYPES[head.hidden.dtype]}
    return torch.empty(_native.call("head_kept_floats", **sizes), dtype=torch.float32)


def token_log_probs(head: LinearHead, with_entropy: bool, kept: Tensor | None = None) -> RowResults:
    """Results [N]; ``kept``, of :func:`kept_logits`, receives the logits. The bits do not depend on either option."""
    logp, lse = (torch.empty(len(head.hidden), dtype=torch.float32) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    holder = _Addresses(head, kept)
    run("head_forward", CPU, holder.head, *map(address, (logp, lse, entropy)))
    return RowResults(logp, lse, entropy)


def gradients(
    head: LinearHead, gradient: RowGradient, wanted: Sequence[bool], kept: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (hidden, weight, bias) where ``wanted``; ``kept`` as :func:`token_log_probs` left it."""
    holder = _Addresses(head, kept)
    columns = [column(each, torch.float32, len(head.hidden), CPU) for each in gradient]
    parts = (head.hidden, head.weight, head.bias)
    results = [
        None if part is None or not want else torch.empty(part.shape, dtype=part.dtype)
        for part, want in zip(parts, wanted, strict=True)
    ]
    run("head_backward", CPU, holder.head, *map(address, columns), *map(address, results))
    return results[0], results[1], results[2]


class _Addresses:
    """The arguments of one call, and the tensors that they point into for as long as it runs."""

    def __init__(self, head: LinearHead, kept: Tensor | None) -> None:
        hidden, weight = _rows(head.hidden), _rows(head.weight)
        assert weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype
        assert hidden.device == weight.device == CPU
        ids = column(head.ids, torch.int64, len(hidden), CPU)
        bias = column(head.bias, hidden.dtype, len(weight), CPU)
        self.tensors = (hidden, weight, ids, bias, kept)
        self.head = _native.call(
            "Head",
            hidden=hidden.data_ptr(),
            hidden_stride=hidden.stride(0),
            weight=weight.data_ptr(),
            weight_stride=weight.stride(0),
            bias=address(bias),
            dtype=DTYPES[hidden.dtype],
            round=head.rounded,
            n_tokens=len(hidden),
            n_vocabulary=len(weight),
            depth=hidden.shape[1],
            temperature=head.temperature,
            ids=address(ids),
            kept=address(kept),
        )


def _rows(matrix: Tensor) -> Tensor:
    """With neighbouring columns side by side, a copy where they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
