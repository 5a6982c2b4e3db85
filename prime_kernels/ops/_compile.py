"""log_probs and log_ratios as single nodes of a torch.compile graph.

Registered operators with fake kernels, so that fullgraph=True works and the compiler never looks inside: arguments are
checked and the backend is chosen when the graph runs, with the same errors as without a compiler. The eager call does
not come through here.
"""

import torch
from torch import Tensor

from prime_kernels import _checks, _dispatch
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops import log_ratios as ratios
from prime_kernels.ops._segments import result_dtype


def _values(
    models: list[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: list[float],
    with_entropy: bool,
    backend: str,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(logp, lse, entropy) of each model; entropy is empty where it is not asked for."""
    if backend != "eager":
        dense = [z if z.stride(-1) == 1 else z.contiguous() for z in models]
        logp, lse, entropy = rows.kernel_forward(dense, ids, mask, temperatures, with_entropy, backend)
        columns = [logp, lse, logp.new_empty(len(models), 0) if entropy is None else entropy]
        # Results of an operator must not share memory.
        return [tuple(column[place].clone() for column in columns) for place in range(len(models))]
    results = []
    for z, temperature in zip(models, temperatures, strict=True):
        logp, entropy = rows.reference(z, ids, mask, temperature)
        lse = (z.to(logp.dtype) / temperature).logsumexp(-1)
        lse = lse if mask is None else lse.masked_fill(~mask, 0.0)
        results.append((logp, lse, entropy if with_entropy else logp.new_empty(0)))
    return results


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
    if chosen == "eager":
        return rows.reference_gradient(logits, ids, mask, temperature, grad_logp, grad_entropy).contiguous()
    dense = logits if logits.stride(-1) == 1 else logits.contiguous()
    out = torch.empty_like(dense, memory_format=torch.contiguous_format)
    rows.kernel_backward(dense, ids, mask, lse, entropy, grad_logp, grad_entropy, temperature, out, chosen)
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
