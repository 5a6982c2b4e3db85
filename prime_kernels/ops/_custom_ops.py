"""Log-probabilities, from logits or from hidden states, as single nodes of a torch.compile graph.

Registered operators with fake kernels, so that fullgraph=True works and the compiler never looks inside: arguments are
checked and the backend is chosen when the graph runs, with the same errors as without a compiler. The eager call does
not come through here.
"""

import torch
from torch import Tensor

from prime_kernels import _checks, _dispatch
from prime_kernels._backends import RowGradient
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops import linear_log_probs as linear
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops import log_ratios as ratios


def _values(
    models: list[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: list[float],
    with_entropy: bool,
    backend: str,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(logp, lse, entropy) of each model; entropy is empty where it is not asked for."""
    dense = [z if z.stride(-1) == 1 else z.contiguous() for z in models]
    logp, lse, entropy = rows.log_probs_of_views(dense, ids, mask, temperatures, with_entropy, backend)
    columns = [logp, lse, logp.new_empty(len(models), 0) if entropy is None else entropy]
    # Results of an operator must not share memory.
    return [tuple(column[place].clone() for column in columns) for place in range(len(models))]


def _fake_values(logits: Tensor, ids: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    logp = logits.new_empty(ids.shape, dtype=result_dtype(logits))
    return logp, torch.empty_like(logp), torch.empty_like(logp) if with_entropy else logp.new_empty(0)


@torch.library.custom_op("prime_kernels::log_probs", mutates_args=())
def log_probs(
    logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool, backend: str | None
) -> tuple[Tensor, Tensor, Tensor]:
    ids, temperature, chosen = rows.check(logits, ids, mask, temperature, with_entropy, backend)
    return _values([logits], ids, mask, [temperature], with_entropy, chosen)[0]


@log_probs.register_fake
def _(logits, ids, mask, temperature, with_entropy, backend):
    return _fake_values(logits, ids, with_entropy)


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
    backend: str | None,
) -> Tensor:
    ids = _checks.labels("ids", ids, mask, logits.shape[-1])
    chosen = _dispatch.resolve("log_probs", logits, backend)
    dense = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty_like(dense, memory_format=torch.contiguous_format)
    gradient = RowGradient(lse, entropy, grad_logp, grad_entropy)
    rows.gradient_of_views(dense, ids, mask, gradient, temperature, out, chosen)
    return out


@log_probs_backward.register_fake
def _(logits, ids, mask, lse, entropy, grad_logp, grad_entropy, temperature, backend):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _keep_log_probs(ctx, inputs, output):
    logits, ids, mask, ctx.temperature, ctx.with_entropy, ctx.backend = inputs
    _, lse, entropy = output
    ctx.save_for_backward(logits, ids, mask, lse, entropy)


def _log_probs_gradient(ctx, grad_logp, _grad_lse, grad_entropy):
    logits, ids, mask, lse, entropy = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = grad_entropy = None
    columns = (ids, mask, lse, entropy, grad_logp, grad_entropy)
    return log_probs_backward(logits, *columns, ctx.temperature, ctx.backend), None, None, None, None, None


log_probs.register_autograd(_log_probs_gradient, setup_context=_keep_log_probs)


@torch.library.custom_op("prime_kernels::log_ratios", mutates_args=())
def log_ratios(
    prm_logits: Tensor,
    ref_logits: Tensor,
    ids: Tensor,
    policy_logits: Tensor | None,
    mask: Tensor | None,
    policy_temperature: float,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    models, ids, temperatures, chosen = ratios.check(
        prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, backend
    )
    values = _values(models, ids, mask, temperatures, False, chosen)
    prm, ref = values[ratios.PRM], values[ratios.REF]
    policy = values[ratios.POLICY] if len(values) > ratios.POLICY else [prm[0].new_empty(0) for _ in range(2)]
    return prm[0], ref[0], policy[0], prm[1], policy[1]


@log_ratios.register_fake
def _(prm_logits, ref_logits, ids, policy_logits, mask, policy_temperature, backend):
    prm, prm_lse, none = _fake_values(prm_logits, ids, False)
    ref = _fake_values(ref_logits, ids, False)[0]
    policy, policy_lse = (none, none.clone()) if policy_logits is None else _fake_values(policy_logits, ids, False)[:2]
    return prm, ref, policy, prm_lse, policy_lse


def _keep_log_ratios(ctx, inputs, output):
    prm_logits, _, ids, policy_logits, mask, ctx.policy_temperature, ctx.backend = inputs
    ctx.save_for_backward(prm_logits, policy_logits, ids, mask, *output[3:])


def _log_ratios_gradient(ctx, grad_prm, _grad_ref, grad_policy, _grad_prm_lse, _grad_policy_lse):
    prm_logits, policy_logits, ids, mask, prm_lse, policy_lse = ctx.saved_tensors

    def gradient(logits, lse, grad, temperature):
        return log_probs_backward(logits, ids, mask, lse, None, grad, None, temperature, ctx.backend)

    prm = policy = None
    if ctx.needs_input_grad[0]:
        prm = gradient(prm_logits, prm_lse, grad_prm, 1.0)
    if policy_logits is not None and ctx.needs_input_grad[3]:
        policy = gradient(policy_logits, policy_lse, grad_policy, ctx.policy_temperature)
    return prm, None, None, policy, None, None, None


log_ratios.register_autograd(_log_ratios_gradient, setup_context=_keep_log_ratios)


@torch.library.custom_op("prime_kernels::linear_log_probs", mutates_args=())
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    with_entropy: bool,
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = (hidden, weight, ids, bias, mask, temperature, with_entropy, logits_dtype, backend)
    head, ids, settings = linear.check(*arguments)
    head = _as_computed(head, settings)
    flat, flat_ids, valid = linear.compact(head.hidden, ids, mask)
    if not len(flat):
        zeros = _fake_values(hidden, ids, with_entropy)
        return tuple(column.zero_() for column in zeros)
    of = tiles.LinearHead(flat, head.weight, head.bias, flat_ids, settings.temperature, settings.rounded)
    columns = tiles.head_log_probs(of, with_entropy, settings.backend)
    logp, lse, entropy = (None if column is None else linear.spread(column, valid, ids.shape) for column in columns)
    return logp, lse, logp.new_empty(0) if entropy is None else entropy


@linear_log_probs.register_fake
def _(hidden, weight, ids, bias, mask, temperature, with_entropy, logits_dtype, backend):
    return _fake_values(hidden, ids, with_entropy)


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
    wanted: list[bool],
    logits_dtype: str,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias; empty where they are not wanted."""
    ids = _checks.labels("ids", ids, mask, weight.shape[0])
    chosen = _dispatch.resolve("linear_log_probs", hidden, backend)
    settings = linear.Settings(temperature, entropy is not None, linear.check_logits_dtype(logits_dtype), chosen)
    head = _as_computed(linear.Head(hidden, weight, bias), settings)
    flat, flat_ids, valid = linear.compact(head.hidden, ids, mask)
    columns = [None if each is None else each.reshape(-1) for each in (lse, entropy, grad_logp, grad_entropy)]
    if valid is not None:
        columns = [None if each is None else each[valid] for each in columns]
    gradients = [each.new_zeros(each.shape) if want else each.new_empty(0) for each, want in _wanted(head, wanted)]
    if len(flat):
        gradient = RowGradient(*columns)
        of = tiles.LinearHead(flat, head.weight, head.bias, flat_ids, temperature, settings.rounded)
        found = tiles.head_gradients(of, gradient, wanted, chosen)
        if found[0] is not None:
            rows_of = slice(None) if valid is None else valid
            gradients[0].view(-1, hidden.shape[-1])[rows_of] = found[0]
        gradients[1:] = [given if each is None else each for given, each in zip(gradients[1:], found[1:], strict=True)]
    return tuple(each.to(hidden.dtype) for each in gradients)


@linear_log_probs_backward.register_fake
def _(
    hidden, weight, ids, bias, mask, lse, entropy, grad_logp, grad_entropy, temperature, wanted, logits_dtype, backend
):
    each_wanted = _wanted(linear.Head(hidden, weight, bias), wanted)
    return tuple(each.new_empty(each.shape if want else (0,)) for each, want in each_wanted)


def _wanted(head: linear.Head, wanted: list[bool]) -> list[tuple[Tensor, bool]]:
    """What each gradient looks like, and whether it is wanted."""
    bias = head.weight if head.bias is None else head.bias
    return [(head.hidden, wanted[0]), (head.weight, wanted[1]), (bias, wanted[2] and head.bias is not None)]


def _as_computed(head: linear.Head, settings: linear.Settings) -> linear.Head:
    """The eager product is float32 whatever the inputs, unless logits are to be rounded."""
    if settings.backend != "eager" or settings.rounded:
        return head
    dtype = result_dtype(head.hidden)
    return linear.Head(*(None if each is None else each.to(dtype) for each in head))


def _keep_linear(ctx, inputs, output):
    hidden, weight, ids, bias, mask, ctx.temperature, ctx.with_entropy, ctx.logits_dtype, ctx.backend = inputs
    ctx.save_for_backward(hidden, weight, ids, bias, mask, *output[1:])


def _linear_gradient(ctx, grad_logp, _grad_lse, grad_entropy):
    hidden, weight, ids, bias, mask, lse, entropy = ctx.saved_tensors
    if not ctx.with_entropy:
        entropy = grad_entropy = None
    wanted = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    columns = (lse, entropy, grad_logp, grad_entropy)
    options = (ctx.temperature, wanted, ctx.logits_dtype, ctx.backend)
    found = linear_log_probs_backward(hidden, weight, ids, bias, mask, *columns, *options)
    of_hidden, of_weight, of_bias = (each if want else None for each, want in zip(found, wanted, strict=True))
    return of_hidden, of_weight, None, of_bias, None, None, None, None, None


linear_log_probs.register_autograd(_linear_gradient, setup_context=_keep_linear)
