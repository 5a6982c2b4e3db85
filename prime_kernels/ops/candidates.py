"""The probable tokens of each position, from the pass that scores the sampled one, and the policy loss over them.

    C = {v : p_v >= min_prob},    p = softmax(z),    z as in log_probs or linear_log_probs

    distribution_ppo_loss = sum_t weights_t sum_{v in C_t} p_old(v) max(-A_v rho_v, -A_v clip(rho_v)) / denominator,
    rho_v = exp(logp_v - old_logp_v),  clip to [1 - clip_low, 1 + clip_high]

There are at most floor(1 / min_prob) candidates, 1.3 on average at 0.1 on the mathematics of arXiv 2604.13197.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._backends import LinearHead
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _several_ids
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops import linear_log_probs as linear
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops._softcap import check_softcap, row_kernels
from prime_kernels.ops.ppo_loss import PPOLoss, check_denominator, ppo_loss

# A probability that rounding of lse in float32 may have lowered still counts, in nats.
ROUNDING = 1e-6
# 1 / min_prob columns are returned.
LOWEST_MIN_PROB = 1e-3


class Candidates(NamedTuple):
    """Tokens of each position in falling order of probability, M = floor(1 / min_prob) columns."""

    ids: Tensor
    """[..., M] int64, 0 after the last candidate."""
    logp: Tensor
    """[..., M] log-probabilities, -inf after the last candidate: with the bits that log_probs or linear_log_probs of
    several ids gives for ids after the first, if it takes the logits in equal tiles."""
    counts: Tensor
    """[...] int64: candidates of each position."""
    token_logp: Tensor | None
    """[...] log-probabilities of the ``ids`` that were given, with the bits of log_probs or linear_log_probs (of a Head
    on "eager" within the rounding of float32)."""


def most_candidates(min_prob: float) -> int:
    """floor(1 / min_prob), where the quotient's rounding does not count."""
    return math.floor((1.0 + 1e-12) / min_prob)


def candidates(
    scored: Tensor | linear.Head,
    ids: Tensor | None = None,
    *,
    min_prob: float = 0.1,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> Candidates:
    """All tokens with a probability of at least ``min_prob``, in the pass that scores the sampled token. No gradients.

    For gradients, give these ids [..., M] to :func:`prime_kernels.log_probs` or
    :func:`prime_kernels.linear_log_probs`, and the log-probs to :func:`prime_kernels.distribution_ppo_loss`. "cpu"
    searches each row while it is in cache; with a Head it makes the few blocks of logits that hold a candidate again.
    "triton" and "cuda" read a few percent of the logits or of the tile once more; "eager" uses torch.topk on them.
    Equally probable tokens come in the order of their ids.

    Args:
        scored: logits [..., V], as in :func:`prime_kernels.log_probs`; or a Head, of which logits never exist at once.
        ids: [...], int32 or int64, in [0, V): the sampled tokens, or None.
        min_prob: in [0.001, 1]. A token within 1e-6 nats of it counts.
        mask: [...], bool, or None for all. Where False there are no candidates and nothing is read.
        temperature: above 0, divides the logits.
        softcap: above 0 or None, caps the logits; a Head has its own.
        logits_dtype: of a Head, as in :func:`prime_kernels.linear_log_probs`.
        backend: see :mod:`prime_kernels`.

    Returns:
        Candidates(ids, logp, counts, token_logp); log-probs are float32, float64 for float64 inputs. A row without a
        distribution (NaN or +inf, or nothing but -inf) has none.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, temperature, min_prob or logits_dtype; softcap beside a Head; logits_dtype
            "input" beside logits.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2604.13197, equation 10.
    """
    min_prob = _checks.number("min_prob", min_prob, LOWEST_MIN_PROB, 1.0)
    temperature = rows.check_temperature("temperature", temperature)
    most = most_candidates(min_prob)
    search = _several_ids.Search(min_prob, most + 1)
    rounded = linear.check_logits_dtype(logits_dtype)
    if isinstance(scored, linear.Head):
        if softcap is not None:
            raise ValueError(f"softcap: expected None beside a Head, which has its own, got {softcap}")
        head = linear.whole_head(scored)
        _checks.floating("hidden", head.hidden)
        shape, given = head.hidden.shape[:-1], _given(ids, head.hidden)
        checked = linear.check_head(head, given, mask, "")
        chosen = _dispatch.resolve("candidates", head.hidden, backend)
        tokens = linear.compact(head.hidden, checked, mask)
        temperature, softcap = linear.as_product(head, temperature)
        with torch.no_grad():
            found = _of_head(tokens, head, (temperature, rounded, softcap), chosen, search)
        places = tokens.places
    else:
        if rounded:
            raise ValueError('logits_dtype: expected "float32" with logits, which have a dtype, got "input"')
        softcap = check_softcap("softcap", softcap)
        rows.check_logits("logits", scored)
        shape, given = scored.shape[:-1], _given(ids, scored)
        checked = rows.check_arguments(scored, given, mask, name="logits", vocabulary=scored.shape[-1])
        chosen = _dispatch.resolve("candidates", scored, backend)
        flat = scored.detach().reshape(-1, scored.shape[-1])
        flat = flat if flat.stride(-1) == 1 else flat.contiguous()
        flat_mask, kernels = None if mask is None else mask.reshape(-1), row_kernels(chosen, softcap)
        arguments = (flat, checked.reshape(-1), flat_mask, temperature, search.log_min, search.slots)
        of_rows = kernels.token_candidates(*arguments)
        found = _several_ids.Rows(of_rows.logp.unsqueeze(1), of_rows.lse, None, of_rows.found_ids, of_rows.found)
        places = None
    best = _best(found, temperature, min_prob, most)
    spread = [linear.spread(column, places, shape) for column in (best.ids, best.logp, best.counts, found.logp[:, 0])]
    if places is not None:
        assert mask is not None
        spread[1].masked_fill_(~mask.unsqueeze(-1), -torch.inf)
    return Candidates(spread[0], spread[1], spread[2], None if ids is None else spread[3])


def _given(ids: Tensor | None, scored: Tensor) -> Tensor:
    if ids is not None:
        return ids
    return torch.zeros(scored.shape[:-1], dtype=torch.int64, device=scored.device)


def _of_head(
    tokens: linear.ValidTokens,
    head: linear.Head,
    product: tuple[float, bool, float | None],
    backend: str,
    search: _several_ids.Search,
) -> _several_ids.Rows:
    """``product`` is (temperature, rounded, softcap) of a LinearHead."""
    if not len(tokens.hidden):
        empty = tokens.hidden.new_empty(0, 1, dtype=result_dtype(tokens.hidden))
        return _several_ids.Rows(empty, empty[:, 0], None, tokens.ids.new_empty(0, 1), empty)
    scored = LinearHead(tokens.hidden, head.weight, head.bias, tokens.ids, *product)
    if backend in tiles.HEAD_KERNELS:
        of_head = _backends.head(backend).token_candidates(scored, search.log_min, search.slots)
        return _several_ids.Rows(of_head.logp.unsqueeze(1), of_head.lse, None, of_head.found_ids, of_head.found)
    return _several_ids.rows_of_head(scored._replace(ids=tokens.ids.unsqueeze(1)), False, backend, search)


def _best(found: _several_ids.Rows, temperature: float, min_prob: float, most: int) -> Candidates:
    """The candidates [N, most] among what was found, ids of which ascend."""
    assert found.found_ids is not None and found.found is not None
    logp = found.found.double() / temperature - found.lse.double().unsqueeze(1)
    keep = (found.found_ids >= 0) & (logp >= math.log(min_prob) - ROUNDING)
    # Stable: equally probable tokens stay in the order of their ids.
    logp, order = logp.where(keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    ids = found.found_ids.where(keep, 0).gather(1, order)
    counts = keep.sum(1).clamp(max=most)
    missing = most - ids.shape[1]
    if missing > 0:
        ids, logp = pad(ids, (0, missing)), pad(logp, (0, missing), value=-math.inf)
    return Candidates(ids[:, :most], logp[:, :most].to(found.logp.dtype), counts, None)


def distribution_ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> PPOLoss:
    """Clipped PPO loss over the candidates of each position, weighted by their old probabilities.

    :func:`prime_kernels.ppo_loss` with the factors exp(old_logp): the formula is at the top of this file.
    Differentiable in ``logp`` alone; nothing waits for the device.

    Args:
        logp: [..., K], floating point: log-probs of the candidates under the policy being trained.
        old_logp: the shape of ``logp``: under the policy that sampled, as of :func:`prime_kernels.candidates`. Where
            it is -inf there is no candidate, and what ``logp`` and ``advantages`` hold has no effect. A constant.
        advantages: the shape of ``logp``. Constants.
        mask: [...], bool, or None for all positions.
        weights: [...], floating point, or None for 1: factors of the positions' losses. Constants.
        clip_low: in [0, 1], how far the ratio may fall.
        clip_high: at least 0, how far it may rise.
        denominator: what to divide by: a number or a tensor of one element above 0. None: the valid positions given
            here, whether they have candidates or not.
        backend: see :mod:`prime_kernels`.

    Returns:
        PPOLoss of three scalars, float32 (float64 for float64 logp); ``clip_fraction`` and ``approx_kl`` are means over
        the candidates, not weighted. Without candidates all are 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a clip range or a denominator out of range.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2604.13197, equations 10 and 11.
    """
    _checks.floating("logp", logp)
    if logp.ndim == 0:
        raise ValueError("logp: expected shape [..., K], got []")
    _checks.like("old_logp", _checks.floating("old_logp", old_logp), logp, "logp")
    positions = math.prod(logp.shape[:-1])
    old_logp = old_logp.detach()
    there = old_logp != -torch.inf
    if mask is not None:
        _checks.tensor("mask", mask, (torch.bool,))
        _checks.shape("mask", mask, logp.shape[:-1], "the leading dimensions of logp")
        _checks.device("mask", mask, logp, "logp")
        there = there & mask.unsqueeze(-1)
    share = old_logp.to(result_dtype(logp)).exp()
    if weights is not None:
        _checks.shape(
            "weights", _checks.floating("weights", weights), logp.shape[:-1], "the leading dimensions of logp"
        )
        _checks.device("weights", weights, logp, "logp")
        share = share * weights.detach().to(share.dtype).unsqueeze(-1)
    if denominator is not None:
        denominator = check_denominator(denominator, logp, "logp")
    else:
        denominator = float(max(positions, 1)) if mask is None else mask.sum().clamp(min=1)
    chosen = _dispatch.resolve("distribution_ppo_loss", logp, backend)
    return ppo_loss(
        logp,
        old_logp,
        advantages,
        mask=there,
        weights=share,
        clip_low=clip_low,
        clip_high=clip_high,
        denominator=denominator,
        backend=chosen,
    )
