"""The policy's update: PPO-clip over the packed batch, every mean over the whole minibatch and not per micro-batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import PolicyConfig
from ..models import lm_head
from ..models.protocols import CausalLM
from ..scale.transfer import Values
from .batch import Batch, Micro, Parts
from .candidates import CandidateTargets
from .forward import predicting
from .trainable import Trainable


@dataclass(frozen=True)
class Targets:
    """What the policy learns from, [T] each, in the batch's packed order."""

    advantages: Tensor
    old_logp: Tensor | None = None
    """Log-probs that PPO's ratio compares with; None: those of the policy as it is, a ratio of exactly 1."""
    ref_logp: Tensor | None = None
    """Log-probs of the frozen reference; required where `policy.kl_coef` is above 0."""
    importance: Tensor | None = None
    """Weights of each token's PPO loss."""
    candidates: CandidateTargets | None = None
    """Tokens that each position has beside the sampled one, whose loss is added."""


def minibatches_of(batch: Batch, cfg: PolicyConfig, generator: torch.Generator) -> list[list[int]]:
    """The groups of each optimizer step, `cfg.epochs` x `cfg.minibatches`; `generator` shuffles them."""
    return [part for _ in range(cfg.epochs) for part in batch.minibatches(cfg.minibatches, generator)]


def policy_update(
    policy: Trainable,
    batch: Batch,
    targets: Targets,
    cfg: PolicyConfig,
    *,
    micro_batch_tokens: int,
    parts: Parts,
    lr_scale: float = 1.0,
    temperature: float = 1.0,
) -> Values:
    """An optimizer step for each of `parts` (`minibatches_of`); returns their mean metrics.

    `temperature` is the one that was sampled at. Each step waits once for its gradients' norm, which decides whether it
    is taken; the other metrics stay on the device.
    """
    if cfg.kl_coef > 0 and targets.ref_logp is None:
        raise ValueError(f"policy.kl_coef = {cfg.kl_coef} needs the reference's log-probs, got none")
    lengths = batch.cu_seqlens.diff()
    per_token = torch.repeat_interleave(1.0 / lengths.clamp_min(1), lengths, output_size=batch.num_tokens)
    batch.lay_out(parts, micro_batch_tokens)
    totals: dict[str, Tensor] = {}
    norms = 0.0
    for part in parts:
        tokens = batch.tokens_of(part)
        for micro in batch.micro_batches(part, micro_batch_tokens):
            loss, metrics = _loss(_Pass(
                policy.model, micro, batch.ids[micro.tokens],
                advantages=targets.advantages[micro.tokens],
                old_logp=_at(targets.old_logp, micro),
                ref_logp=_at(targets.ref_logp, micro),
                importance=_at(targets.importance, micro),
                candidates=None if targets.candidates is None else targets.candidates.at(micro.tokens),
                # One weight a token turns the token mean into the mean over responses of each response's mean.
                weights=None if cfg.loss_mean == "token" else per_token[micro.tokens],
                denominator=tokens if cfg.loss_mean == "token" else batch.responses_of(part),
                share=len(micro.tokens) / max(1, tokens),
                temperature=temperature, cfg=cfg,
            ))  # fmt: skip
            loss.backward()
            for key, value in metrics.items():
                totals[key] = totals.get(key, 0.0) + value.double()
        norms += policy.step(lr_scale)
    summed = batch.ranks.sum_scalars(totals)
    return {key: value / len(parts) for key, value in summed.items()} | {"policy_grad_norm": norms / len(parts)}


def _at(values: Tensor | None, micro: Micro) -> Tensor | None:
    return None if values is None else values[micro.tokens]


@dataclass(frozen=True)
class _Pass:
    """Inputs of the loss of one forward pass; tensors are [t], over the pass's response tokens."""

    model: CausalLM
    micro: Micro
    ids: Tensor
    advantages: Tensor
    old_logp: Tensor | None
    ref_logp: Tensor | None
    importance: Tensor | None
    candidates: CandidateTargets | None
    weights: Tensor | None
    denominator: int
    """Of means over the minibatch: its tokens, or with `weights` its responses."""
    share: float
    """Of the minibatch's tokens."""
    temperature: float
    cfg: PolicyConfig


def _loss(at: _Pass) -> tuple[Tensor, dict[str, Tensor]]:
    """The pass's part of the minibatch's loss, and of its metrics."""
    cfg, hidden = at.cfg, predicting(at.model, at.micro)
    weights = at.weights
    if at.importance is not None:
        weights = at.importance if weights is None else weights * at.importance

    def mean(values: Tensor) -> Tensor:
        return (values if at.weights is None else values * at.weights).sum() / at.denominator

    if cfg.fused_loss and at.candidates is None and not lm_head.is_split(at.model):
        head = lm_head.head(at.model, hidden)
        ppo = pk.linear_ppo_loss(
            head.hidden, head.weight, at.ids, at.old_logp, at.advantages, bias=head.bias,
            weights=weights, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
            denominator=at.denominator,
            **lm_head.options(at.model, at.temperature),
        )  # fmt: skip
        return ppo.loss, _metrics(ppo, at.share)
    # The sampled token first: of several it is the one with the bits that it has alone.
    several = None if at.candidates is None else torch.cat([at.ids.unsqueeze(1), at.candidates.ids], 1)
    found, entropy = lm_head.log_probs(
        at.model, hidden, at.ids if several is None else several,
        temperature=at.temperature, with_entropy=cfg.entropy_coef > 0,
    )  # fmt: skip
    logp = found if several is None else found[:, 0]
    old = logp.detach() if at.old_logp is None else at.old_logp
    ppo = pk.ppo_loss(
        logp, old, at.advantages,
        weights=weights, clip_low=cfg.clip_low, clip_high=cfg.clip_high, dual_clip=cfg.dual_clip,
        denominator=at.denominator,
    )  # fmt: skip
    loss, metrics = ppo.loss, _metrics(ppo, at.share)
    if at.candidates is not None:
        of_candidates = pk.distribution_ppo_loss(
            found[:, 1:], at.candidates.old_logp, at.candidates.advantages, weights=at.weights,
            clip_low=cfg.clip_low, clip_high=cfg.clip_high, denominator=at.denominator,
        ).loss  # fmt: skip
        loss = loss + at.candidates.coef * of_candidates
        metrics["distribution_loss"] = of_candidates.detach()
    if entropy is not None:
        loss = loss - cfg.entropy_coef * mean(entropy)
    if cfg.kl_coef > 0 and at.ref_logp is not None:
        gap = at.ref_logp - logp
        # k3 and k2 (Schulman 2020), neither of which is ever negative.
        kl = mean(gap.exp() - gap - 1 if cfg.kl_estimator == "k3" else gap.square() / 2)
        loss = loss + cfg.kl_coef * kl
        metrics["kl_ref"] = kl.detach()
    return loss, metrics


def _metrics(ppo: pk.PPOLoss, share: float) -> dict[str, Tensor]:
    return {
        "policy_loss": ppo.loss.detach(),
        "clip_fraction": ppo.clip_fraction * share,
        "approx_kl": ppo.approx_kl * share,
    }
