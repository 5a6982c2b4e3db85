"""Offline training of an implicit PRM from response-level labels (arXiv 2412.01981), step labels mixed in if given.

The reward of a token is beta * q_t, q_t = log pi_prm - log pi_ref. Outcomes enter by `prime_kernels.prm_loss`; a step
label y in [0, 1] by (sigmoid(Q_k - Q_{k-1}) - y)^2, the mean over the labelled steps of a batch, where Q_k is the sum
of rewards up to the end of step k.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.run_config import RunConfig
from ..config.sections import COUPLED_KINDS, AdapterConfig, TrainPRMConfig
from ..models import forward, loading, meta, prm_record, tokenizers
from ..models.adapters.views import adapted, as_model
from ..models.placement import load_trained
from ..models.protocols import CausalLM
from ..report.statistics import auc
from ..run import checkpoint, hub
from ..run.output_lock import owns_output
from ..run.seeds import shuffled
from ..scale.transfer import Values, upload, upload_together
from ..train.batch import Batch, Micro
from ..train.forward import log_probs
from ..train.nonfinite_guard import Skips
from ..train.prm_objective import Objective, backward
from ..train.supervised_loop import fit
from ..train.trainable import Trainable
from .items import StepGroup
from .reference_cache import Reference
from .training_data import outcome_groups, step_groups


@owns_output
def run(cfg: RunConfig) -> Path:
    """Trains `cfg.model` on `cfg.train_prm.path`; returns the directory of the saved PRM.

    Ctrl-C stops after the current step and leaves a checkpoint for `--resume` beside the PRM as it is then.
    """
    own = cfg.train_prm
    if own.path is None:
        raise ValueError("train_prm.path is required: the rows with labelled responses")
    reference_model = cfg.model.model_copy(update={"adapter": AdapterConfig()})
    if own.reference is not None:
        reference_model = reference_model.elsewhere(own.reference, "train_prm.reference")
    if cfg.resume:
        hub.resume(cfg.output)
    models = loading.fingerprints({"model.path": cfg.model, "train_prm.reference": reference_model})
    state = checkpoint.begin(cfg, models)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    if own.reference is not None:
        tokenizers.check_same_tokenizer(
            tokenizer, tokenizers.load_tokenizer(reference_model), ("model.path", "train_prm.reference")
        )
    model = load_trained(cfg.model, cfg.seed)
    read_by = [model] if own.reference is None else [model, meta.meta_model(reference_model)]
    limit = forward.length_limit(read_by, own.max_length)
    train, held_out = outcome_groups(own.path, own, tokenizer, limit, cfg.seed)
    stage2 = [] if own.step_path is None else step_groups(own.step_path, own, tokenizer, limit)
    view = adapted(model)
    base = None if view is None or own.reference is not None else as_model(view.base.view(None))
    reference = Reference(reference_model, tokenizer, own.cache, cfg.micro_batch_tokens, base)
    outcomes = _Source(train, own.batch_size, reference, cfg.seed, "outcomes")
    steps = _Source(stage2, own.step_batch_size, reference, cfg.seed, "steps") if stage2 else None
    evaluation = _Source(held_out, own.batch_size, reference, cfg.seed, "held-out") if held_out else None
    trainable = Trainable(model, lr=own.lr, betas=(0.9, 0.95), grad_clip=own.grad_clip)
    total = own.epochs * len(outcomes.batches)
    skips = Skips(min(own.max_skipped, total), "train_prm.max_skipped", "train_prm.lr")

    def backward(step: int) -> Values:
        values = _backward_outcomes(model, outcomes.at(step), own, cfg.micro_batch_tokens)
        if steps is not None:
            step_loss = _backward_steps(model, steps.at(step), own, cfg.micro_batch_tokens).double()
            values |= {"step_loss": step_loss, "loss": values["loss"] + own.step_coef * step_loss}
        return values

    def evaluate(step: int) -> dict[str, float]:
        due = step == total or (own.eval_every and step % own.eval_every == 0)
        return _evaluate(model, evaluation, own, cfg.micro_batch_tokens) if due and evaluation else {}

    final = cfg.output / "final"
    fit(
        cfg, cfg.checkpoint, cfg.metrics, "prm", state, trainable, total, backward,
        warmup=own.warmup, skips=skips, floor=0.1, evaluate=evaluate,
        finish=lambda: loading.save(model, tokenizer, final, beside=prm_record.files(own)), models=models,
    )  # fmt: skip
    return final


@dataclass(frozen=True)
class _Labelled:
    """A batch on the model's device with the reference's log-probs [T]."""

    groups: list[StepGroup]
    ref_logp: Tensor


class _Source:
    """Batches whose members the data alone decides, so that cached log-probs fit; the seed decides their order."""

    def __init__(self, groups: Sequence[StepGroup], size: int, reference: Reference, seed: int, name: str) -> None:
        # By content: rows of a file often stand in an order that means something.
        mixed = sorted(groups, key=_content)
        per_group = sum(len(g.responses) for g in mixed) / len(mixed)
        per_batch = max(1, round(size / per_group))
        parts = [mixed[at : at + per_batch] for at in range(0, len(mixed), per_batch)]
        pairs = zip(parts, reference.log_probs(parts), strict=True)
        self.batches = [_Labelled(part, logp) for part, logp in pairs]
        self._seed, self._name = seed, name

    def at(self, step: int) -> _Labelled:
        """The batch of a step, from 0; every epoch has its own order."""
        epoch, at = divmod(step, len(self.batches))
        return self.batches[shuffled(len(self.batches), self._seed, "prm", self._name, epoch)[at]]


def _content(group: StepGroup) -> bytes:
    return hashlib.sha256(json.dumps([group.prompt_ids, [r.ids for r in group.responses]]).encode()).digest()


def _backward_outcomes(model: CausalLM, labelled: _Labelled, cfg: TrainPRMConfig, max_tokens: int) -> Values:
    batch = Batch.for_model(model, labelled.groups)
    everything = range(len(batch.groups))
    objective = Objective(batch, everything, cfg.kind, cfg.scale, margin=cfg.margin)
    ref_logp = upload(labelled.ref_logp, batch.device)
    coupled = cfg.kind in COUPLED_KINDS
    logp = backward(model, batch, everything, ref_logp, objective.loss, max_tokens, coupled=coupled)
    found = objective(logp - ref_logp)
    return {
        "loss": found.loss,
        "pair_accuracy": found.pair_accuracy,
        "tokens": batch.num_tokens,
        "responses": batch.num_responses,
    }


def _backward_steps(model: CausalLM, labelled: _Labelled, cfg: TrainPRMConfig, max_tokens: int) -> Tensor:
    batch = Batch.for_model(model, labelled.groups)
    responses = [r for g in labelled.groups for r in g.responses]
    offsets, start = [0], 0
    for response in responses:
        offsets += [start + at for at in response.cu_steps[1:]]
        start += len(response.ids)
    # A step without a label takes part in no mean.
    given = [y for r in responses for y in r.step_labels]
    at = [k for k, y in enumerate(given) if y is not None]
    cu_steps, known = upload_together([torch.tensor(offsets), torch.tensor(at, dtype=torch.int64)], batch.device)
    labels = upload(torch.tensor([y for y in given if y is not None], dtype=torch.float32), batch.device)

    def loss_of(log_ratio: Tensor) -> Tensor:
        rewards = pk.step_rewards(cfg.scale * log_ratio, cu_steps, batch.cu_seqlens)
        return (torch.sigmoid(rewards[known]) - labels).square().mean()

    def scaled(log_ratio: Tensor) -> Tensor:
        return cfg.step_coef * loss_of(log_ratio)

    ref_logp = upload(labelled.ref_logp, batch.device)
    logp = backward(model, batch, range(len(batch.groups)), ref_logp, scaled, max_tokens, coupled=False)
    return loss_of(logp - ref_logp)


@torch.no_grad()
def _log_ratio(model: CausalLM, batch: Batch, ref_logp: Tensor, micros: Sequence[Micro]) -> Tensor:
    out = torch.zeros(batch.num_tokens, device=batch.device)
    for micro in micros:
        out[micro.tokens] = log_probs(model, micro, batch.ids[micro.tokens]) - ref_logp[micro.tokens]
    return out


def _evaluate(model: CausalLM, source: _Source, cfg: TrainPRMConfig, max_tokens: int) -> dict[str, float]:
    """Loss, pair accuracy and AUC over all held-out responses: of their summed rewards, of the means for "prefix"."""
    ratios = []
    for labelled in source.batches:
        batch = Batch.for_model(model, labelled.groups)
        micros = batch.micro_batches(range(len(batch.groups)), max_tokens)
        ratios.append(_log_ratio(model, batch, labelled.ref_logp.to(model.device), micros))
    everything = Batch([group for labelled in source.batches for group in labelled.groups], model.device)
    log_ratio = torch.cat(ratios)
    found = pk.prm_loss(
        log_ratio, everything.outcomes, everything.cu_seqlens,
        cu_groups=everything.cu_groups, kind=cfg.kind, beta=cfg.scale, margin=cfg.margin,
    )  # fmt: skip
    scores = pk.segment_sum(log_ratio, everything.cu_seqlens)
    if cfg.kind == "prefix":
        scores = scores / everything.cu_seqlens.diff().clamp(min=1)
    return {
        "eval_loss": found.loss.item(),
        "eval_pair_accuracy": found.pair_accuracy.item(),
        "eval_auc": auc(scores, everything.outcomes > 0.5),
    }
