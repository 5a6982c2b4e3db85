"""Log-ratios of up to three models straight from hidden states, each head as in linear_log_probs."""

import torch
from torch import Tensor

from prime_kernels import _dispatch
from prime_kernels.ops import linear_log_probs as linear
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops.linear_log_probs import Head
from prime_kernels.ops.log_ratios import LogRatios


def linear_log_ratios(
    prm: Head,
    ref: Head,
    ids: Tensor,
    *,
    policy: Head | None = None,
    mask: Tensor | None = None,
    policy_temperature: float = 1.0,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> LogRatios:
    """:func:`prime_kernels.log_ratios` from hidden states and output layers, without ever holding all logits.

    Equal hidden states and heads give a log-ratio of exactly 0. Differentiable in every tensor of ``prm`` and
    ``policy``; the reference model gets no gradient. The models may have different widths D.

    Args:
        prm: Head of the process reward model.
        ref: Head of the reference model.
        ids: [...], int32 or int64, in [0, V) of every head.
        policy: Head of the policy, or None.
        mask: [...], bool, or None for all. Where False every result is exactly 0 and nothing is read.
        policy_temperature: above 0, divides the logits of the policy alone.
        logits_dtype: of every head, as in :func:`linear_log_probs`.
        backend: see :mod:`prime_kernels`.

    Returns:
        LogRatios of [...], float32 or float64; ``policy_logp`` is None without ``policy``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, temperature or logits_dtype.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2412.01981 and arXiv 2502.01456, section 2.
    """
    heads = {"prm": prm, "ref": ref} | ({} if policy is None else {"policy": policy})
    for name, head in heads.items():
        if not isinstance(head, Head):
            raise TypeError(f"{name}: expected a Head, got {type(head).__name__}")

    if torch.compiler.is_compiling():

        def of_head(head: Head, temperature: float = 1.0) -> Tensor:
            temperature, softcap = linear.as_product(head, temperature)
            return linear.linear_log_probs(
                head.hidden, head.weight, ids, bias=head.bias, mask=mask, temperature=temperature, softcap=softcap,
                logits_dtype=logits_dtype,
                backend=backend,
            )  # fmt: skip

        prm_logp = of_head(prm)
        with torch.no_grad():
            ref_logp = of_head(ref)
        policy_logp = None if policy is None else of_head(policy, policy_temperature)
        return LogRatios(prm_logp - ref_logp, prm_logp, ref_logp, policy_logp)
    heads = {name: linear.whole_head(head) for name, head in heads.items()}
    checked = {name: linear.check_head(head, ids, mask, f"{name}.") for name, head in heads.items()}
    policy_temperature = rows.check_temperature("policy_temperature", policy_temperature)
    rounded = linear.check_logits_dtype(logits_dtype)
    logp = {}
    for name, head in heads.items():
        temperature = policy_temperature if name == "policy" else 1.0
        # Each head has its own backend: they may differ in dtype, and float64 runs on "eager" alone.
        chosen = _dispatch.resolve("linear_log_ratios", head.hidden, backend)
        with torch.set_grad_enabled(torch.is_grad_enabled() and name != "ref"):
            tokens = linear.compact(head.hidden, checked[name], mask)
            if chosen == "eager" or not len(tokens.hidden):
                logp[name] = linear.reference(head, checked[name], mask, temperature, rounded)[0]
                continue
            settings = linear.Settings(*linear.as_product(head, temperature), False, rounded, chosen)
            options = (settings, None, torch.is_grad_enabled())
            found, _ = linear.TiledLogProbs.apply(tokens.hidden, head.weight, head.bias, tokens.ids, *options)
            logp[name] = linear.spread(found, tokens.places, ids.shape)
    return LogRatios(logp["prm"] - logp["ref"], logp["prm"], logp["ref"], logp.get("policy"))
