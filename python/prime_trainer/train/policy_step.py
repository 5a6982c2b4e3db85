"""The policy's update: PPO-clip over the packed batch, every mean over the whole minibatch and not per micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import PolicyConfig
from ..models import lm_head
from .batch import Batch
from .forward import predicting
from .trainable import Trainable


def needs_old_logp(cfg: PolicyConfig) -> bool:
    """With a single optimizer step a batch the policy that is updated is the one that sampled: rho is exactly 1."""
    return cfg.epochs * cfg.minibatches > 1


def policy_update(
    policy: Trainable,
    batch: Batch,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    cfg: PolicyConfig,
    micro_batch_tokens: int,
    generator: torch.Generator,
    lr_scale: float = 1.0,
    *,
    importance: Tensor | None = None,
    temperature: float = 1.0,
) -> dict[str, float]:
    """`epochs` x `minibatches` optimizer steps; returns their mean metrics.

    `importance` [T] weighs each token's PPO loss; `temperature` is the one that was sampled at.
    """
    lengths = batch.cu_seqlens.diff()
    per_token = torch.repeat_interleave(1.0 / lengths.clamp_min(1), lengths)
    totals: dict[str, float] = {}
    steps, norms = 0, 0.0
    for _ in range(cfg.epochs):
        for part in batch.minibatches(cfg.minibatches, generator):
            tokens, responses = batch.tokens_of(part), batch.responses_of(part)
            for micro in batch.micro_batches(part, micro_batch_tokens):
                loss, metrics = _loss(
                    policy, batch, micro, advantages, old_logp, ref_logp, cfg, per_token, tokens, responses,
                    importance, temperature,
                )  # fmt: skip
                loss.backward()
                for key, value in metrics.items():
                    totals[key] = totals.get(key, 0.0) + value.item()
            norms += policy.step(lr_scale)
            steps += 1
    totals = batch.ranks.sum_values(totals) | {"policy_grad_norm": norms}
    return {key: value / steps for key, value in totals.items()}


def _loss(
    policy, batch, micro, advantages, old_logp, ref_logp, cfg, per_token, tokens, responses, importance, temperature
):
    hidden = predicting(policy.model, micro)
    ids = batch.ids[micro.tokens]
    by_token = cfg.loss_mean == "token"
    # One weight a token turns the token mean into the mean over responses of each response's mean.
    weights = None if by_token else per_token[micro.tokens]
    denominator = tokens if by_token else responses
    old = None if old_logp is None else old_logp[micro.tokens]
    both = weights
    if importance is not None:
        both = importance[micro.tokens] if weights is None else weights * importance[micro.tokens]
    options = {"weights": both, "clip_low": cfg.clip_low, "clip_high": cfg.clip_high, "denominator": denominator}
    if cfg.entropy_coef == 0 and cfg.kl_coef == 0 and not lm_head.is_split(policy.model):
        at = lm_head.head(policy.model, hidden)
        ppo = pk.linear_ppo_loss(
            at.hidden, at.weight, ids, old, advantages[micro.tokens], bias=at.bias, temperature=temperature, **options
        )
    else:
        logp, entropy = lm_head.log_probs(
            policy.model, hidden, ids, temperature=temperature, with_entropy=cfg.entropy_coef > 0
        )
        ppo = pk.ppo_loss(logp, logp.detach() if old is None else old, advantages[micro.tokens], **options)
    loss = ppo.loss
    share = len(micro.tokens) / max(1, tokens)
    metrics = {
        "policy_loss": ppo.loss.detach(),
        "clip_fraction": ppo.clip_fraction * share,
        "approx_kl": ppo.approx_kl * share,
    }

    def mean(values: Tensor) -> Tensor:
        return (values if weights is None else values * weights).sum() / denominator

    if cfg.entropy_coef > 0:
        loss = loss - cfg.entropy_coef * mean(entropy)
    if cfg.kl_coef > 0:
        gap = ref_logp[micro.tokens] - logp
        kl = mean(gap.exp() - gap - 1)  # k3 (Schulman 2020): unbiased, never negative
        loss = loss + cfg.kl_coef * kl
        metrics["kl_ref"] = kl.detach()
    return loss, metrics
