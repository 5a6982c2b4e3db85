"""Row kernels in plain PyTorch, for custom operators and ``inplace_backward``, where autograd cannot be used."""

from collections.abc import Sequence

import torch
from torch import Tensor

from prime_kernels._backends import RowCandidates, RowGradient, RowResults
from prime_kernels._segment_math import result_dtype

SEARCH_SLACK = 1e-5
"""Nats by which a search goes below its bound: the caller decides with the lse of the whole vocabulary."""


def token_log_probs(
    models: Sequence[Tensor], ids: Tensor, mask: Tensor | None, temperatures: Sequence[float], with_entropy: bool
) -> RowResults:
    """Results [models, N] of the models' logits [N, V]."""
    dtype = torch.float64 if any(z.dtype == torch.float64 for z in models) else torch.float32
    columns = []
    for logits, temperature in zip(models, temperatures, strict=True):
        z = logits.to(result_dtype(logits)) / temperature
        lse = z.logsumexp(-1)
        lse = lse.masked_fill(lse == torch.inf, torch.nan)
        log_p = z - lse.unsqueeze(-1)
        found = [log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), lse]
        if with_entropy:
            found.append(-(log_p.exp() * _finite(log_p)).sum(-1))
        columns.append([(each if mask is None else each.masked_fill(~mask, 0.0)).to(dtype) for each in found])
    logp, lse, *entropy = (torch.stack(column) for column in zip(*columns, strict=True))
    return RowResults(logp, lse, entropy[0] if entropy else None)


def token_candidates(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, log_min_prob: float, slots: int
) -> RowCandidates:
    """Results [N] of logits [N, V] and, by torch.topk, the tokens of a log-probability of at least ``log_min_prob``."""
    results = token_log_probs([logits], ids, mask, [temperature], False).only_model()
    found, found_ids = logits.topk(min(slots, logits.shape[-1]), -1)
    found = found.to(result_dtype(logits))
    # Comparisons with NaN, as where a row has no distribution, are false.
    good = found / temperature - results.lse.unsqueeze(-1) >= log_min_prob - SEARCH_SLACK
    good &= results.lse.isfinite().unsqueeze(-1)
    if mask is not None:
        good &= mask.unsqueeze(-1)
    return RowCandidates(
        results.logp, results.lse, *ascending(found_ids.where(good, -1), found.where(good, -torch.inf))
    )


def ascending(found_ids: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """Columns [N, slots] in the order of their ids, free slots, with id -1, last."""
    last = torch.iinfo(found_ids.dtype).max
    found_ids, order = found_ids.where(found_ids >= 0, last).sort(-1)
    return found_ids.where(found_ids < last, -1), found.gather(-1, order)


def logits_gradient(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    gradient: RowGradient,
    temperature: float,
    out: Tensor,
    partial: bool = False,
) -> None:
    """Write d loss / d logits [N, V] to ``out``, which may be ``logits`` itself; ``partial`` as in the kernels."""
    lse, entropy, grad_logp, grad_entropy = gradient
    log_p = logits.to(result_dtype(logits)) / temperature - lse.unsqueeze(-1)
    p = log_p.exp()
    total = torch.zeros_like(p)
    if grad_logp is not None:
        inside = (ids >= 0) & (ids < logits.shape[-1])
        at = ids.where(inside, 0).unsqueeze(-1)
        own = grad_logp.where(inside, 0.0).to(p.dtype).unsqueeze(-1)
        total = (-grad_logp.unsqueeze(-1) * p).scatter_add(-1, at, own)
    if grad_entropy is not None:
        assert entropy is not None
        total = total - grad_entropy.unsqueeze(-1) * p * (_finite(log_p) + entropy.unsqueeze(-1))
    total = total / temperature
    out.copy_(total if mask is None else total.masked_fill(~mask.unsqueeze(-1), 0.0))


def _finite(log_p: Tensor) -> Tensor:
    """A token of probability 0 has log p = -inf; p log p is to be 0."""
    return log_p.masked_fill(log_p == -torch.inf, 0.0)
