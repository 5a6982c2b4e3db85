"""The clipped policy loss of PPO over tokens.

rho = exp(logp - old_logp)
loss_t = max(-A * rho, -A * clip(rho, 1 - clip_low, 1 + clip_high)), at most -A * dual_clip where A < 0
loss = sum_t weights_t * loss_t / denominator
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import ClipRange, PPOTokens
from prime_kernels._constants import MAX_LOG_RHO
from prime_kernels._segment_math import result_dtype


class PPOLoss(NamedTuple):
    """Scalars on the device: the loss, the fraction of clipped tokens, and the mean of old_logp - logp."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def reference(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    denominator: Tensor | float | None,
) -> PPOLoss:
    """Token losses in the dtype of logp, sums in float64."""
    dtype = result_dtype(logp)

    def valid(values: Tensor) -> Tensor:
        # Fills the inputs, not the losses: 0 * NaN at a masked position would still reach the gradient.
        return values.to(dtype) if mask is None else values.to(dtype).masked_fill(~mask, 0.0)

    log_rho = valid(logp) - valid(old_logp.detach())
    advantage = valid(advantages.detach())
    rho = log_rho.clamp(max=MAX_LOG_RHO).exp()
    free = -advantage * rho
    clipped = -advantage * rho.clamp(1.0 - clip_low, 1.0 + clip_high)
    clipping = clipped > free
    losses = torch.where(clipping, clipped, free)
    if dual_clip is not None:
        bounding = (advantage < 0) & (rho > dual_clip)
        losses = torch.where(bounding, -advantage * dual_clip, losses)
        clipping = clipping | bounding
    if weights is not None:
        losses = losses * valid(weights.detach())
    count = torch.full((), logp.numel(), dtype=torch.int64, device=logp.device) if mask is None else mask.sum()
    count = count.clamp(min=1)
    loss = losses.double().sum() / (count if denominator is None else denominator)
    clip_fraction = clipping.double().sum() / count
    approx_kl = -log_rho.detach().double().sum() / count
    return PPOLoss(loss.to(dtype), clip_fraction.to(dtype), approx_kl.to(dtype))


class TokenLoss(torch.autograd.Function):
    """The loss and its statistics on a backend."""

    @staticmethod
    def forward(
        ctx: Any,
        logp: Tensor,
        constants: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
        clip: ClipRange,
        denominator: Tensor | float | None,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = PPOTokens(logp, *constants)
        results = _backends.packed(backend).ppo_loss_and_scale(tokens, clip, denominator)
        ctx.save_for_backward(*tokens, results.scale)
        ctx.clip, ctx.backend = clip, backend
        ctx.mark_non_differentiable(results.clip_fraction, results.approx_kl)
        return results.loss, results.clip_fraction, results.approx_kl

    @staticmethod
    @first_derivative_only("ppo_loss")
    def backward(ctx: Any, grad: Tensor, *_statistics: Tensor) -> Gradients:
        *tokens, scale = ctx.saved_tensors
        gradient = _backends.packed(ctx.backend).ppo_gradient(PPOTokens(*tokens), ctx.clip, scale, grad)
        return gradient, None, None, None, None


def ppo_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    denominator: Tensor | float | None = None,
    backend: str | None = None,
) -> PPOLoss:
    """Clipped PPO loss over tokens. Differentiable in ``logp`` alone; nothing waits for the device.

    loss = sum_t weights_t * max(-A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high)) / denominator with
    rho = exp(logp - old_logp). Where both terms are equal, the gradient is that of the unclipped one. Beyond a
    log-ratio of 20 the ratio is clamped to e^20 and has no gradient, so that no loss is infinite. With ``dual_clip``
    the loss of a token with A_t < 0 is -A_t dual_clip, without a gradient, where its ratio is above that.

    Args:
        logp: [T] (or any shape), floating point: log-probabilities under the policy being trained.
        old_logp: the shape of ``logp``: under the policy that sampled. A constant.
        advantages: the shape of ``logp``. Constants.
        mask: bool, the shape of ``logp``, or None for all. What masked positions hold, NaN included, has no effect.
        weights: the shape of ``logp``: factors of the token losses, such as importance weights, or 1 / length for a
            mean over sequences. They do not change the default denominator. Constants.
        clip_low: in [0, 1], how far the ratio may fall.
        clip_high: at least 0, how far it may rise.
        dual_clip: above 1, the largest ratio that counts for a negative advantage, such as 3; None for no such bound.
        denominator: what to divide by: a number or a tensor of one element above 0. Give the token count of the whole
            batch so that micro-batch losses add up. None: the valid tokens given here.
        backend: see :mod:`prime_kernels`.

    Returns:
        PPOLoss of three scalars, float32 (float64 for float64 logp). ``clip_fraction``, of all bounds, and
        ``approx_kl`` are means over the valid tokens given here, independent of denominator and weights. Without valid
        tokens all are 0.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, a clip range or a denominator out of range.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 1707.06347, equation 7, and arXiv 2502.01456, section 3; dual clip: arXiv 1912.09729.
    """
    _checks.floating("logp", logp)
    for name, value in (("old_logp", old_logp), ("advantages", advantages), ("weights", weights)):
        if value is not None or name != "weights":
            _checks.like(name, _checks.floating(name, value), logp, "logp")
    _checks.mask(mask, logp, "logp")
    clip_low = _checks.number("clip_low", clip_low, 0.0, 1.0)
    clip_high = _checks.number("clip_high", clip_high, 0.0, math.inf)
    if dual_clip is not None:
        dual_clip = _checks.number("dual_clip", dual_clip, 1.0, math.inf, above_low=True)
    if denominator is not None:
        denominator = check_denominator(denominator, logp, "logp")
    chosen = _dispatch.resolve("ppo_loss", logp, backend)
    if chosen == "eager":
        return reference(logp, old_logp, advantages, mask, weights, clip_low, clip_high, dual_clip, denominator)
    flat = [None if each is None else each.detach().reshape(-1).float() for each in (old_logp, advantages, weights)]
    constants = (*flat, None if mask is None else mask.reshape(-1))
    clip = ClipRange(clip_low, clip_high, math.inf if dual_clip is None else dual_clip)
    results = TokenLoss.apply(logp.reshape(-1).float(), constants, clip, denominator, chosen)
    return PPOLoss(*results)


def check_denominator(denominator: Tensor | float, like: Tensor, source: str) -> Tensor | float:
    """A number above 0, or a tensor of one such number on the device of ``like``, the argument ``source``."""
    if not isinstance(denominator, Tensor):
        return _checks.number("denominator", denominator, 0.0, math.inf, above_low=True)
    _checks.tensor("denominator", denominator, (*_checks.FLOATS, *_checks.INTEGERS))
    if denominator.numel() != 1:
        raise ValueError(f"denominator: expected one element, got shape {list(denominator.shape)}")
    _checks.device("denominator", denominator, like, source)
    denominator = denominator.detach().double().reshape(())
    _checks.positive("denominator", denominator)
    return denominator
