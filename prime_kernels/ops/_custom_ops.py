"""Log-probabilities from logits or hidden states as custom operators: single nodes of a torch.compile graph.

They have fake kernels, so that fullgraph=True works and the compiler does not trace them. Arguments are checked and the
backend is selected when the graph runs, with the same errors as without a compiler. Calls outside torch.compile do not
come here.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_kernels import _backends, _checks, _dispatch
from prime_kernels._autograd import Gradients
from prime_kernels._backends import RowGradient
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops import linear_log_probs as linear
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops import log_ratios as ratios


class Columns(NamedTuple):
    """Results of one model in the shape of ids; empty where not asked for, as operators cannot return None."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor


def _plain(columns: Columns) -> tuple[Tensor, Tensor, Tensor]:
    """A tuple as operators return it."""
    return columns.logp, columns.lse, columns.entropy


def _values(
    models: list[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: list[float],
    softcap: float | None,
    with_entropy: bool,
    backend: str,
) -> list[Columns]:
    """Results of each model, in separate memory: results of an operator must not share any."""
    dense = [z if z.stride(-1) == 1 else z.contiguous() for z in models]
    results = rows.log_probs_of_views(dense, ids, mask, temperatures, with_entropy, backend, softcap)
    found = []
    for place in range(len(models)):
        logp, lse = (rows.of_model(column, place, ids.shape) for column in results[:2])
        entropy = logp.new_empty(0) if results.entropy is None else rows.of_model(results.entropy, place, ids.shape)
        found.append(Columns(logp, lse, entropy))
    return found


def _fake_values(logits: Tensor, ids: Tensor, with_entropy: bool) -> Columns:
    logp = logits.new_empty(ids.shape, dtype=result_dtype(logits))
    return Columns(logp, torch.empty_like(logp), torch.empty_like(logp) if with_entropy else logp.new_empty(0))


def _no_values(like: Tensor) -> Columns:
    return Columns(*(like.new_empty(0) for _ in range(3)))


@torch.library.custom_op("prime_kernels::log_probs", mutates_args=())
def log_probs(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, temperature, chosen = rows.check(logits, ids, mask, temperature, with_entropy, backend)
    return _plain(_values([logits], ids, mask, [temperature], softcap, with_entropy, chosen)[0])


@log_probs.register_fake
def _(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _plain(_fake_values(logits, ids, with_entropy))


@torch.library.custom_op("prime_kernels::log_probs_backward", mutates_args=())
def log_probs_backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    backend: str | None,
) -> Tensor:
    ids = _checks.labels("ids", ids, mask, logits.shape[-1])
    chosen = _dispatch.resolve("log_probs", logits, backend)
    dense = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = _backends.empty_like(dense, chosen)
    gradient = RowGradient(lse, entropy, grad_logp, grad_entropy)
    rows.gradient_of_views(dense, ids, mask, gradient, temperature, out, chosen, softcap)
    return out


@log_probs_backward.register_fake
def _(logits: Tensor, *_options: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_log_probs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ids, mask, ctx.temperature, ctx.softcap, ctx.with_entropy, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, ids, mask, lse, entropy)


def _log_probs_gradient(
    ctx: Any, grad_logp: Tensor | None, _grad_lse: Tensor | None, grad_entropy: Tensor | None
) -> Gradients:
    logits, ids, mask, lse, entropy = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = grad_entropy = None
    columns = (ids, mask, lse, entropy, grad_logp, grad_entropy)
    found = log_probs_backward(logits, *columns, ctx.temperature, ctx.softcap, ctx.backend)
    return found, None, None, None, None, None, None


log_probs.register_autograd(_log_probs_gradient, setup_context=_keep_log_probs)


@torch.library.custom_op("prime_kernels::log_ratios", mutates_args=())
def log_ratios(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
    softcap: float | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    models, ids, temperatures, chosen = ratios.check(
        prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, backend
    )
    values = _values(models, ids, mask, temperatures, softcap, False, chosen)
    prm, ref = values[ratios.PRM], values[ratios.REF]
    policy = values[ratios.POLICY] if len(values) > ratios.POLICY else _no_values(prm.logp)
    return prm.logp, ref.logp, policy.logp, prm.lse, policy.lse


@log_ratios.register_fake
def _(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
    softcap: float | None,
    backend: str | None,
) -> tuple[Tensor, ...]:
    prm, ref = (_fake_values(logits, ids, False) for logits in (prm_logits, ref_logits))
    policy = _no_values(prm.logp) if policy_logits is None else _fake_values(policy_logits, ids, False)
    return prm.logp, ref.logp, policy.logp, prm.lse, policy.lse


def _keep_log_ratios(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    prm_logits, _, ids, policy_logits, mask, ctx.policy_temperature, ctx.softcap, ctx.backend = inputs
    ctx.save_for_backward(prm_logits, policy_logits, ids, mask, *output[3:])


def _log_ratios_gradient(
    ctx: Any, grad_prm: Tensor | None, _grad_ref: Tensor | None, grad_policy: Tensor | None, *_grad_lse: Tensor | None
) -> Gradients:
    prm_logits, policy_logits, ids, mask, prm_lse, policy_lse = ctx.saved_tensors

    def gradient(logits: Tensor, lse: Tensor, grad: Tensor | None, temperature: float) -> Tensor:
        return log_probs_backward(logits, ids, mask, lse, None, grad, None, temperature, ctx.softcap, ctx.backend)

    prm = policy = None
    if ctx.needs_input_grad[0]:
        prm = gradient(prm_logits, prm_lse, grad_prm, 1.0)
    if policy_logits is not None and ctx.needs_input_grad[3]:
        policy = gradient(policy_logits, policy_lse, grad_policy, ctx.policy_temperature)
    return prm, None, None, policy, None, None, None, None


log_ratios.register_autograd(_log_ratios_gradient, setup_context=_keep_log_ratios)


@torch.library.custom_op("prime_kernels::linear_log_probs", mutates_args=())
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (hidden, weight, ids, bias, mask, temperature, softcap, with_entropy, logits_dtype, backend)
    head, ids, settings = linear.check(*arguments)
    head = _as_computed(head, settings)
    tokens = linear.compact(head.hidden, ids, mask)
    if not len(tokens.hidden):
        return _plain(Columns(*(column.zero_() for column in _fake_values(hidden, ids, with_entropy))))
    of_tokens = settings.of_product(tokens.hidden, head.weight, head.bias, tokens.ids)
    results, _ = tiles.head_log_probs(of_tokens, with_entropy, settings.backend)
    logp, lse = (linear.spread(column, tokens.places, ids.shape) for column in results[:2])
    if results.entropy is None:
        return logp, lse, logp.new_empty(0)
    return logp, lse, linear.spread(results.entropy, tokens.places, ids.shape)


@linear_log_probs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _plain(_fake_values(hidden, ids, with_entropy))


@torch.library.custom_op("prime_kernels::linear_log_probs_backward", mutates_args=())
def linear_log_probs_backward(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    wanted: list[bool],
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    ids = _checks.labels("ids", ids, mask, weight.shape[0])
    chosen = _dispatch.resolve("linear_log_probs", hidden, backend)
    settings = linear.Settings(temperature, softcap, False, linear.check_logits_dtype(logits_dtype), chosen)
    head = _as_computed(linear.Head(hidden, weight, bias), settings)
    tokens = linear.compact(head.hidden, ids, mask)
    gradient = RowGradient(lse, entropy, grad_logp, grad_entropy).flat()
    if tokens.places is not None:
        gradient = gradient.rows(tokens.places)
    gradients = [each.new_zeros(each.shape) if want else each.new_empty(0) for each, want in _wanted(head, wanted)]
    if len(tokens.hidden):
        of_tokens = settings.of_product(tokens.hidden, head.weight, head.bias, tokens.ids)
        found = tiles.head_gradients(of_tokens, gradient, wanted, chosen)
        if found.hidden is not None:
            at = slice(None) if tokens.places is None else tokens.places
            gradients[0].view(-1, hidden.shape[-1])[at] = found.hidden
        gradients[1] = gradients[1] if found.weight is None else found.weight
        gradients[2] = gradients[2] if found.bias is None else found.bias
    grad_hidden, grad_weight, grad_bias = (each.to(hidden.dtype) for each in gradients)
    return grad_hidden, grad_weight, grad_bias


@linear_log_probs_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    wanted: list[bool],
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, ...]:
    each_wanted = _wanted(linear.Head(hidden, weight, bias), wanted)
    return tuple(each.new_empty(each.shape if want else (0,)) for each, want in each_wanted)


def _wanted(head: linear.Head, wanted: list[bool]) -> list[tuple[Tensor, bool]]:
    """A tensor of the shape and dtype of each gradient, and whether it is wanted."""
    bias = head.weight if head.bias is None else head.bias
    return [(head.hidden, wanted[0]), (head.weight, wanted[1]), (bias, wanted[2] and head.bias is not None)]


def _as_computed(head: linear.Head, settings: linear.Settings) -> linear.Head:
    """On "eager" the product is float32 for any inputs, unless logits are to be rounded."""
    if settings.backend != "eager" or settings.rounded:
        return head
    dtype = result_dtype(head.hidden)
    bias = None if head.bias is None else head.bias.to(dtype)
    return linear.Head(head.hidden.to(dtype), head.weight.to(dtype), bias)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, ids, bias, mask, ctx.temperature, ctx.softcap, *options = inputs
    ctx.with_entropy, ctx.logits_dtype, ctx.backend = options
    ctx.save_for_backward(hidden, weight, ids, bias, mask, *output[1:])


def _linear_gradient(
    ctx: Any, grad_logp: Tensor | None, _grad_lse: Tensor | None, grad_entropy: Tensor | None
) -> Gradients:
    hidden, weight, ids, bias, mask, lse, entropy = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = grad_entropy = None
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    columns = (lse, entropy, grad_logp, grad_entropy)
    options = (ctx.temperature, ctx.softcap, wanted, ctx.logits_dtype, ctx.backend)
    found = linear_log_probs_backward(hidden, weight, ids, bias, mask, *columns, *options)
    grad_hidden, grad_weight, grad_bias = (each if want else None for each, want in zip(found, wanted, strict=True))
    return grad_hidden, grad_weight, None, grad_bias, None, None, None, None, None, None


linear_log_probs.register_autograd(_linear_gradient, setup_context=_keep_linear)
