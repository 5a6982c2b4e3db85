"""Every public operation as a user calls it, for the type checker alone (`make lint`); never run."""

from collections.abc import Callable
from typing import assert_type

import torch
from torch import Tensor, nn

import prime_kernels as pk
from prime_kernels import integrations
from prime_kernels.integrations import openrlhf, skyrl, trl, verl


def operations(x: Tensor, ids: Tensor, cu: Tensor, flag: bool) -> None:
    assert_type(pk.log_probs(x, ids), Tensor)
    assert_type(pk.log_probs(x, ids, mask=None, temperature=0.5, with_entropy=True), tuple[Tensor, Tensor])
    assert_type(pk.log_probs(x, ids, with_entropy=flag), Tensor | tuple[Tensor, Tensor])
    assert_type(pk.linear_log_probs(x, x, ids, bias=x), Tensor)
    assert_type(pk.linear_log_probs(x, x, ids, with_entropy=True, backend="cpu"), tuple[Tensor, Tensor])
    assert_type(pk.log_ratios(x, x, ids, policy_logits=x).log_ratio, Tensor)
    assert_type(pk.linear_log_ratios(pk.Head(x, x), pk.Head(x, x, x), ids).policy_logp, Tensor | None)
    assert_type(pk.linear_nll(x, x, ids), Tensor)
    assert_type(pk.linear_ppo_loss(x, x, ids, x, x), pk.PPOLoss)
    assert_type(pk.segment_scan(x, cu, gamma=0.9, reverse=True), Tensor)
    assert_type(pk.segment_sum(x, cu), Tensor)
    assert_type(pk.step_rewards(x, cu, cu, mode="cumulative"), Tensor)
    assert_type(pk.rloo_advantages(None, x, cu, cu).advantages, Tensor)
    assert_type(pk.ppo_loss(x, x, x, clip_high=0.3).clip_fraction, Tensor)
    assert_type(pk.prm_loss(x, x, cu, kind="dpo").pair_accuracy, Tensor)
    assert_type(pk.prm_loss(x, x, cu, kind="prefix", beta=10.0, margin=5.0, weights=x, shift=x).loss, Tensor)
    assert_type(pk.candidates(pk.Head(x, x), ids, min_prob=0.2), pk.Candidates)
    assert_type(pk.candidates(x).token_logp, Tensor | None)
    assert_type(pk.distribution_ppo_loss(x, x, x, clip_high=0.28).loss, Tensor)
    assert_type(pk.available_backends(), dict[str, str | None])
    with pk.use_backend("eager"):
        pass


def drop_ins(x: Tensor, ids: Tensor, model: nn.Module) -> None:
    patches: list[Callable[[], integrations.Patched]] = [trl.patch, verl.patch, openrlhf.patch, skyrl.patch]
    undo: list[Callable[[], None]] = [trl.unpatch, verl.unpatch, openrlhf.unpatch, skyrl.unpatch]
    assert len(patches) == len(undo) == 4
    done = trl.patch(logits_dtype="input", replace_fused=True)
    assert_type(done.replaced, tuple[str, ...])
    assert_type(done.left, dict[str, str])
    verl.patch(replace_fused=True)
    openrlhf.patch(replace_fused=True)
    assert_type(skyrl.patch(replace_fused=True), integrations.Patched)
    assert_type(trl.selective_log_softmax(x, ids, row_mask=x), Tensor)
    assert_type(trl.selective_log_softmax_and_entropy(x, ids), tuple[Tensor, Tensor])
    assert_type(verl.logprobs_from_logits(x, ids, inplace_backward=False), Tensor)
    assert_type(verl.compute_rloo_outcome_advantage(x, x, ["a"]), tuple[Tensor, Tensor])
    assert_type(openrlhf.compute_entropy(torch.zeros(2, 3)), Tensor)
    assert_type(integrations.head_logits(x, x, backend="eager"), Tensor)
    assert isinstance(integrations.LogProbHead(model, temperature=0.7, logits_dtype="input"), nn.Module)
    try:
        trl.patch()
    except integrations.IntegrationError as error:
        assert_type(error, integrations.IntegrationError)
