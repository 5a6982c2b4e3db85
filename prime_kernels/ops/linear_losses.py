"""Token losses straight from hidden states, in three products where their logits fit into memory.

If the loss of a token depends on its log-probability alone, d loss / d logp is known as soon as the token's logits are.
On GPUs gradients are made in the forward pass from one tile after another, each of whole rows of logits, in a sixteenth
of the memory: one product gives the loss and its gradient, while linear_log_probs recomputes the logits in backward. In
return, the gradients of ``hidden`` and of the head are kept from forward to backward.

Kernels of a whole head need all logits twice, so they save nothing in the forward pass: there the loss is one of
linear_log_probs, with three products where its logits are kept. Made in the backward pass, the gradients have the
factor of the loss in them before they are rounded; multiplied afterwards, they would be written a second time. So it is
where a product leaves probabilities for the gradient and there is memory for them: half of that of logits. Where a GPU
keeps logits, to write and read all of them takes as long as that second time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prime_kernels import _checks
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops import linear_log_probs as linear
from prime_kernels.ops.ppo_loss import PPOLoss, check_denominator, ppo_loss

# The loss of a span of tokens from their logp [n], followed by its statistics.
LossOf = Callable[[Tensor, slice], tuple[Tensor, ...]]
LossOfResults = Callable[[tuple[Any, ...]], tuple[Any, ...]]


class FusedLoss(torch.autograd.Function):
    """The loss of all tokens and its statistics, which have no gradient. Gradients are made in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        settings: linear.Settings,
        loss_of: LossOf,
    ) -> tuple[Tensor, ...]:
        def grad_of(logp: Tensor, tokens: slice) -> Tensor:
            with torch.enable_grad():
                leaf = logp.detach().requires_grad_()
                return torch.autograd.grad(loss_of(leaf, tokens)[0], leaf)[0]

        wanted = ctx.needs_input_grad[:3]
        head = settings.of_product(hidden, weight, bias, ids)
        logp, gradients = tiles.loss_gradients(head, grad_of, wanted, settings.backend)
        ctx.save_for_backward(*gradients)
        loss, *statistics = loss_of(logp, slice(0, len(logp)))
        ctx.mark_non_differentiable(*statistics)
        return loss, *statistics

    @staticmethod
    @first_derivative_only("linear_nll and linear_ppo_loss")
    def backward(ctx: Any, grad: Tensor, *_statistics: Tensor) -> Gradients:
        # Whatever the factor: on a GPU, reading it would wait for it.
        gradients = [None if each is None else each * grad.to(each.dtype) for each in ctx.saved_tensors]
        return *gradients, None, None, None


class EagerLoss:
    """The loss in plain PyTorch."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        settings: linear.Settings,
        loss_of: LossOf,
    ) -> tuple[Tensor, ...]:
        head = linear.Head(hidden, weight, bias, softcap=settings.softcap)
        logp, _ = linear.reference(head, ids, None, settings.temperature, settings.rounded)
        return loss_of(logp, slice(0, len(logp)))


def _loss_arguments(
    head: linear.Head,
    ids: Tensor,
    mask: Tensor | None,
    settings: linear.Settings,
    columns: list[Tensor | None],
    loss_of: Callable[..., tuple[Tensor, ...]],
) -> tuple[type[FusedLoss] | type[linear.TiledLogProbs] | type[EagerLoss], tuple[Any, ...], LossOfResults]:
    """A function, its arguments, and what makes ``loss_of(logp, *columns)`` of the valid tokens from its results."""
    tokens = linear.compact(head.hidden, ids, mask)
    flat = [None if column is None else column.detach().reshape(-1) for column in columns]
    if tokens.places is not None:
        flat = [None if column is None else column[tokens.places] for column in flat]

    def of_span(logp: Tensor, span: slice) -> tuple[Tensor, ...]:
        return loss_of(logp, *(None if column is None else column[span] for column in flat))

    temperature, softcap = linear.as_product(head, settings.temperature)
    settings = settings._replace(temperature=temperature, softcap=softcap)
    of_head = (tokens.hidden, head.weight, head.bias, tokens.ids, settings)
    if settings.backend == "eager" or not len(tokens.hidden):
        return EagerLoss, (*of_head, of_span), tuple
    if settings.backend in tiles.HEAD_KERNELS or _keeps_probabilities(tokens, head, settings):
        arguments = (*of_head, None, torch.is_grad_enabled())
        return linear.TiledLogProbs, arguments, lambda results: of_span(results[0], slice(0, len(results[0])))
    return FusedLoss, (*of_head, of_span), tuple


def _keeps_probabilities(tokens: linear.ValidTokens, head: linear.Head, settings: linear.Settings) -> bool:
    product = settings.of_product(tokens.hidden, head.weight, head.bias, tokens.ids)
    columns = tiles.gradient_columns(product, settings.backend)
    return columns is not None and tiles.can_keep(product, settings.backend, columns)


def _count(ids: Tensor, mask: Tensor | None) -> Tensor:
    count = torch.full((), ids.numel(), dtype=torch.int64, device=ids.device) if mask is None else mask.sum()
    return count.clamp(min=1)


def _column(name: str, value: Tensor, ids: Tensor) -> Tensor:
    _checks.like(name, _checks.floating(name, value), ids, "ids")
    return value


def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    denominator: Tensor | float | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood (cross-entropy) of tokens from hidden states, in three products with its gradients.

    loss = -sum_t weights_t * logp_t / denominator with logp as of ``linear_log_probs``. Differentiable in ``hidden``,
    ``weight`` and ``bias``. For supervised fine-tuning. On GPUs gradients are made in the forward pass, one product
    fewer than ``linear_log_probs`` and its backward; on CPUs, and where "fused_columns" in a tuning file keeps
    probabilities, they are those of ``linear_log_probs``, with what is kept for them or recomputed as there.

    Args:
        hidden: [..., D], as in :func:`prime_kernels.linear_log_probs`.
        weight: [V, D], the dtype of ``hidden``.
        ids: [...], int32 or int64, in [0, V).
        bias: [V], the dtype of ``hidden``, or None.
        mask: [...], bool, or None for all: the tokens that count.
        weights: [...], floating point, or None for 1: factors of the token losses. Constants.
        temperature: above 0, divides the logits.
        softcap: above 0 or None, as in :func:`prime_kernels.linear_log_probs`.
        denominator: what to divide by: a number or a tensor of one element above 0. Give the token count of the whole
            batch so that micro-batch losses add up. None: the valid tokens given here.
        logits_dtype: "float32" or "input", as in :func:`prime_kernels.linear_log_probs`.
        backend: see :mod:`prime_kernels`.

    Returns:
        The loss, a scalar, float32 (float64 for float64 inputs); 0 without valid tokens.

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as in :func:`prime_kernels.linear_log_probs`.

    Source: cross-entropy; gradients in the forward pass, on GPUs, as in arXiv 2410.10989, section 3.
    """
    if torch.compiler.is_compiling():
        logp = linear.linear_log_probs(
            hidden,
            weight,
            ids,
            bias=bias,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            logits_dtype=logits_dtype,
            backend=backend,
        )
        return _nll(logp, weights, _count(ids, mask) if denominator is None else denominator)
    given = (hidden, weight, ids, bias, mask, temperature, softcap, False, logits_dtype, backend)
    head, ids, settings = linear.check(*given, operation="linear_nll")
    weights = None if weights is None else _column("weights", weights, ids)
    denominator = _count(ids, mask) if denominator is None else check_denominator(denominator, ids, "ids")

    def loss_of(logp: Tensor, weights: Tensor | None) -> tuple[Tensor]:
        return (_nll(logp, weights, denominator),)

    function, arguments, loss_of_results = _loss_arguments(head, ids, mask, settings, [weights], loss_of)
    return loss_of_results(function.apply(*arguments))[0]


def _nll(logp: Tensor, weights: Tensor | None, denominator: Tensor | float) -> Tensor:
    terms = logp if weights is None else logp * weights.to(logp.dtype)
    return (-terms.double().sum() / denominator).to(logp.dtype)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    old_logp: Tensor | None,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    denominator: Tensor | float | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> PPOLoss:
    """Clipped PPO loss from hidden states, in three products with its gradients.

    ``ppo_loss(linear_log_probs(hidden, weight, ids), old_logp, advantages)``, on GPUs with one product fewer, as
    :func:`linear_nll`. Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: [..., D], as in :func:`prime_kernels.linear_log_probs`.
        weight: [V, D], the dtype of ``hidden``.
        ids: [...], int32 or int64, in [0, V).
        old_logp: [...], floating point, as in :func:`prime_kernels.ppo_loss`, as are the next arguments; or None where
            this very policy sampled: every ratio is 1.
        advantages: [...].
        bias: [V], the dtype of ``hidden``, or None.
        mask: [...], bool, or None for all: the tokens that count.
        weights: [...] or None.
        temperature: above 0, divides the logits.
        softcap: above 0 or None, as in :func:`prime_kernels.linear_log_probs`.
        clip_low: in [0, 1].
        clip_high: at least 0.
        dual_clip: above 1, or None.
        denominator: a number or a tensor of one element above 0, or None for the valid tokens given here.
        logits_dtype: "float32" or "input", as in :func:`prime_kernels.linear_log_probs`.
        backend: see :mod:`prime_kernels`.

    Returns:
        PPOLoss of three scalars, float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailable: as in the two functions it stands for.

    Source: arXiv 1707.06347, equation 7; gradients in the forward pass, on GPUs, as in arXiv 2410.10989, section 3.
    """
    if torch.compiler.is_compiling():
        logp = linear.linear_log_probs(
            hidden,
            weight,
            ids,
            bias=bias,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
            logits_dtype=logits_dtype,
            backend=backend,
        )
        old_logp = logp if old_logp is None else old_logp
        return ppo_loss(
            logp,
            old_logp,
            advantages,
            mask=mask,
            weights=weights,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            denominator=denominator,
        )
    given = (hidden, weight, ids, bias, mask, temperature, softcap, False, logits_dtype, backend)
    head, ids, settings = linear.check(*given, operation="linear_ppo_loss")
    columns = [
        None if old_logp is None else _column("old_logp", old_logp, ids),
        _column("advantages", advantages, ids),
        None if weights is None else _column("weights", weights, ids),
    ]
    denominator = _count(ids, mask) if denominator is None else check_denominator(denominator, ids, "ids")

    def loss_of(logp: Tensor, old_logp: Tensor | None, advantages: Tensor, weights: Tensor | None) -> PPOLoss:
        old_logp = logp if old_logp is None else old_logp
        return ppo_loss(
            logp,
            old_logp,
            advantages,
            weights=weights,
            clip_low=clip_low,
            clip_high=clip_high,
            dual_clip=dual_clip,
            denominator=denominator,
        )

    function, arguments, loss_of_results = _loss_arguments(head, ids, mask, settings, columns, loss_of)
    return PPOLoss(*loss_of_results(function.apply(*arguments)))
