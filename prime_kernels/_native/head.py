"""Output layers on CPUs in C++: log-probs of hidden states, and gradients, from float32 logits that stay in cache.

The microkernels multiply packed operands with float32 accumulators and take the softmax of a tile from there. Each
logit is summed over the width in one fixed order, each token's softmax over the vocabulary in another; neither depends
on other tokens or on the number of threads. Log-probs and entropies have the same bits whatever else is in the call.

Callers have checked shapes, dtypes and ranges; the assertions only guard memory.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._backends import HeadGradients, LinearHead, RowCandidates, RowGradient, RowResults
from prime_kernels._layout import column
from prime_kernels._native import _C, DTYPES, address, empty

CPU = torch.device("cpu")


def token_log_probs(head: LinearHead, with_entropy: bool, keep: bool = False) -> tuple[RowResults, Tensor | None]:
    """Results, and with ``keep`` the float32 logits, in an order that only :func:`gradients` knows."""
    kept = None
    if keep:
        n_tokens, depth, dtype = *head.hidden.shape, DTYPES[head.hidden.dtype]
        size = _C.head_kept_floats(n_tokens=n_tokens, n_vocabulary=len(head.weight), depth=depth, dtype=dtype)
        kept = empty(torch.float32, size)
    arguments = _Arguments(head, kept)
    logp = torch.empty(head.ids.shape, dtype=torch.float32, device=CPU)
    lse = torch.empty(len(head.hidden), dtype=torch.float32, device=CPU)
    entropy = torch.empty_like(lse) if with_entropy else None
    _C.head_forward(**arguments.fields, logp=logp.data_ptr(), lse=lse.data_ptr(), entropy=address(entropy))
    return RowResults(logp, lse, entropy), kept


def token_candidates(head: LinearHead, log_min_prob: float, slots: int) -> RowCandidates:
    """Results of one id a token with the bits of :func:`token_log_probs`, and its candidates."""
    arguments, n_tokens = _Arguments(head, None), len(head.hidden)
    assert head.ids.ndim == 1
    logp, lse = torch.empty(2, n_tokens, dtype=torch.float32, device=CPU)
    found_ids = torch.empty(n_tokens, slots, dtype=torch.int64, device=CPU)
    found = torch.empty(n_tokens, slots, dtype=torch.float32, device=CPU)
    _C.head_candidates(
        **arguments.fields,
        logp=logp.data_ptr(),
        lse=lse.data_ptr(),
        log_min_prob=log_min_prob,
        n_slots=slots,
        found_ids=found_ids.data_ptr(),
        found=found.data_ptr(),
    )
    return RowCandidates(logp, lse, found_ids, found)


def logits(head: LinearHead) -> Tensor:
    """All logits [N, V], float32: capped, not divided by the temperature."""
    (n_tokens, depth), vocabulary, dtype = head.hidden.shape, len(head.weight), DTYPES[head.hidden.dtype]

    def floats(tokens: int) -> int:
        return _C.head_kept_floats(n_tokens=tokens, n_vocabulary=vocabulary, depth=depth, dtype=dtype)

    if not n_tokens:
        return torch.empty(0, vocabulary, dtype=torch.float32, device=CPU)
    # Kept logits lie in panels of as many tokens as vectors have lanes: [panels, padded vocabulary, lanes].
    lanes = next(tokens for tokens in itertools.count(1) if floats(tokens + 1) > floats(1))
    _, kept = token_log_probs(head, False, keep=True)
    assert kept is not None
    panels = kept.view(-1, floats(1) // lanes, lanes)[:, :vocabulary]
    return panels.transpose(1, 2).reshape(-1, vocabulary)[:n_tokens].contiguous()


def gradients(
    head: LinearHead, gradient: RowGradient, wanted: Sequence[bool], kept: Tensor | None = None
) -> HeadGradients:
    """Gradients of hidden, weight and bias where ``wanted``; ``kept`` as :func:`token_log_probs` returned it."""
    arguments = _Arguments(head, kept)
    lse, entropy, grad_entropy = (
        column(each, torch.float32, len(head.hidden), CPU)
        for each in (gradient.lse, gradient.entropy, gradient.grad_entropy)
    )
    grad_logp = column(gradient.grad_logp, torch.float32, head.ids.numel(), CPU)
    results = HeadGradients(
        *(
            None if part is None or not want else empty(part.dtype, *part.shape)
            for part, want in zip((head.hidden, head.weight, head.bias), wanted, strict=True)
        )
    )
    _C.head_backward(
        **arguments.fields,
        lse=address(lse),
        entropy=address(entropy),
        grad_logp=address(grad_logp),
        grad_entropy=address(grad_entropy),
        grad_hidden=address(results.hidden),
        grad_weight=address(results.weight),
        grad_bias=address(results.bias),
    )
    return results


class _Arguments:
    """The arguments of one call, and the tensors that they point into for as long as it runs."""

    def __init__(self, head: LinearHead, kept: Tensor | None) -> None:
        hidden, weight = _rows(head.hidden), _rows(head.weight)
        assert weight.shape[1] == hidden.shape[1] and weight.dtype == hidden.dtype
        assert hidden.device == weight.device == CPU
        n_ids = 1 if head.ids.ndim == 1 else head.ids.shape[1]
        ids = column(head.ids, torch.int64, len(hidden) * n_ids, CPU)
        bias = column(head.bias, hidden.dtype, len(weight), CPU)
        self.tensors = (hidden, weight, ids, bias, kept)
        self.fields: dict[str, int | float] = {
            "hidden": hidden.data_ptr(),
            "hidden_stride": hidden.stride(0),
            "weight": weight.data_ptr(),
            "weight_stride": weight.stride(0),
            "bias": address(bias),
            "dtype": DTYPES[hidden.dtype],
            "rounded": head.rounded,
            "n_tokens": len(hidden),
            "n_vocabulary": len(weight),
            "depth": hidden.shape[1],
            "temperature": head.temperature,
            "softcap": 0.0 if head.softcap is None else head.softcap,
            "ids": address(ids),
            "n_ids": n_ids,
            "kept": address(kept),
            "n_threads": torch.get_num_threads(),
        }


def _rows(matrix: Tensor) -> Tensor:
    """With neighbouring columns side by side, a copy where they are not."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
