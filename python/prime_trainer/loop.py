"""Online PRIME, top to bottom: the only file that knows all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import prime_kernels as pk

from . import checkpoint, models
from .batch import Batch, Group
from .clock import Clock
from .config import RunConfig
from .errors import RunError
from .evaluate import evaluate
from .interrupt import stop_signal
from .metrics import MetricsWriter
from .mismatch import importance
from .progress import progress_bar
from .rollout import derive_seed
from .rollouts import Rollouts
from .score import Rewards, Scorer, process_rewards
from .tasks import load_task
from .update import needs_old_logp, policy_update
from .verify import Verifier


class Run:
    """Everything a run holds between two steps."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.tokenizer = models.load_tokenizer(cfg.model)
        self.task = load_task(cfg.task, cfg.seed)
        model = models.load_model(cfg.model)
        self.policy = models.Trainable(model, lr=cfg.policy.lr, grad_clip=cfg.policy.grad_clip)
        dense = cfg.algorithm.process_coef > 0
        self.prm = self.ref = None
        if dense:
            self.prm = models.Trainable(models.load_model(cfg.model), lr=cfg.prm.lr, grad_clip=cfg.prm.grad_clip)
        if cfg.policy.kl_coef > 0 or (dense and cfg.prm.ref_type == "freeze"):
            self.ref = models.frozen(models.load_model(cfg.model))
        # An engine's log-probs are not quite the trainer's; transformers samples with the trainer's own model.
        self.compares = cfg.rollout.engine != "transformers" or cfg.rollout.tis_cap > 0
        old_wanted = needs_old_logp(cfg.policy) or (dense and cfg.prm.ref_type == "policy") or self.compares
        self.scorer = Scorer(
            model if old_wanted else None, self.ref, self.prm, cfg.prm, cfg.micro_batch_tokens, cfg.rollout.temperature
        )
        self.step_ends = _newline_tokens(self.tokenizer, model).to(model.device)
        self.verifier = Verifier.from_config(cfg.task)
        try:
            self.rollouts = Rollouts(cfg, model, self.tokenizer, self.task, self.verifier)
        except BaseException:
            self.verifier.close()
            raise
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "config": self.cfg.model_dump_json(),
            "policy": self.policy.state_dict(),
            "prm": None if self.prm is None else self.prm.state_dict(),
            "rollouts": self.rollouts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        if self.prm is not None:
            self.prm.load_state_dict(state["prm"])
        self.rollouts.load_state_dict(state["rollouts"])
        self.step = state["step"]

    def evaluate(self) -> dict[str, float]:
        cfg = self.cfg
        return self.rollouts.evaluate(self.step, lambda sampler: evaluate(
            self.task.held_out(), self.tokenizer, sampler, self.verifier,
            max_new_tokens=cfg.rollout.max_new_tokens, temperature=cfg.rollout.temperature, sampled=cfg.eval.sampled,
        ))  # fmt: skip

    def train_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One PRIME step; its metrics, and a few responses for the report."""
        cfg, algorithm, clock = self.cfg, self.cfg.algorithm, Clock()
        step = self.step + 1

        groups, values = self.rollouts.batch(step, clock)
        batch = Batch(groups, self.policy.model.device)
        values["kept_reward"] = batch.outcomes.mean().item()

        with clock("score" if self.prm is None or cfg.prm.update == "none" else "prm"):
            scores = self.scorer.score(batch)
        values |= scores.metrics
        weights = None
        if self.compares:
            weights, compared = importance(scores.old_logp, batch.rollout_logp, cfg.rollout.tis_cap)
            values |= compared

        rewards = Rewards(None, None)
        if self.prm is not None:
            rewards = process_rewards(scores.log_ratio, batch, cfg.prm, self.step_ends)
        advantages = pk.rloo_advantages(
            rewards.values, batch.outcomes, batch.cu_seqlens, batch.cu_groups, reward_mask=rewards.carries,
            gamma_process=algorithm.gamma_process, gamma_outcome=algorithm.gamma_outcome,
            process_coef=algorithm.process_coef, outcome_coef=algorithm.outcome_coef,
            normalize_process=algorithm.normalize_process, process_baseline=algorithm.process_baseline,
            whiten=algorithm.whiten,
        ).advantages  # fmt: skip

        with clock("policy"):
            shuffle = torch.Generator().manual_seed(derive_seed(cfg.seed, "shuffle", step))
            values |= policy_update(
                self.policy, batch, advantages, scores.old_logp if needs_old_logp(cfg.policy) else None,
                scores.ref_logp, cfg.policy, cfg.micro_batch_tokens, shuffle,
                lr_scale=min(1.0, step / max(1, cfg.policy.warmup_steps)), importance=weights,
                temperature=cfg.rollout.temperature,
            )  # fmt: skip
        self.step = step
        return values | clock.times(), _examples(step, batch, rewards, advantages, self.tokenizer)

    def close(self) -> None:
        self.rollouts.close()
        self.verifier.close()


def run(cfg: RunConfig) -> Path:
    """Trains until `cfg.steps`, or until Ctrl-C, which leaves a checkpoint; returns the final model's directory."""
    state = checkpoint.begin(cfg)
    trainer = Run(cfg)
    if state is not None:
        trainer.load_state_dict(state)
    checkpoint.write_config(cfg)
    metrics = MetricsWriter(cfg.output, resume_step=trainer.step if cfg.resume else None)
    saved = trainer.step
    try:
        if trainer.step == 0:
            metrics.log("eval", 0, trainer.evaluate())
        with progress_bar("rl", cfg.steps, trainer.step) as bar, stop_signal() as stop:
            while trainer.step < cfg.steps and not stop.is_set():
                values, examples = trainer.train_step()
                step = trainer.step
                metrics.log("rl", step, values)
                metrics.samples(step, examples)
                bar.advance(f"reward {values['reward']:.2f}  {values['time/total']:.0f} s")
                if (cfg.eval.every and step % cfg.eval.every == 0) or step == cfg.steps:
                    metrics.log("eval", step, trainer.evaluate())
                if cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
                    checkpoint.save(cfg.output, step, trainer.state_dict(), cfg.checkpoint.keep)
                    saved = step
        if saved != trainer.step:
            checkpoint.save(cfg.output, trainer.step, trainer.state_dict(), cfg.checkpoint.keep)
        models.save(trainer.policy.model, trainer.tokenizer, cfg.output / "final")
        if trainer.prm is not None:
            models.save(trainer.prm.model, trainer.tokenizer, cfg.output / "prm")
    except RunError:
        checkpoint.save(cfg.output, trainer.step, trainer.state_dict(), cfg.checkpoint.keep)
        raise
    finally:
        metrics.close()
        trainer.close()
    return cfg.output / "final"


def _newline_tokens(tokenizer: Any, model: Any) -> torch.Tensor:
    """bool [V]: tokens whose text has a line break end a step."""
    size = model.get_output_embeddings().weight.shape[0]
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
    ends = torch.zeros(size, dtype=torch.bool)
    ends[: len(texts)] = torch.tensor(["\n" in t for t in texts])
    return ends


def _examples(
    step: int, batch: Batch, rewards: Rewards, advantages: torch.Tensor, tokenizer: Any, count: int = 2
) -> list[dict[str, Any]]:
    """All responses of the step's first group would be alike in length: take the first of the first groups instead."""
    first, starts = batch.cu_groups.tolist(), batch.cu_seqlens.tolist()
    rows = []
    for g, group in enumerate(batch.groups[:count]):
        for k in sorted({_best(group), _worst(group)}):
            r, response = first[g] + k, group.responses[k]
            span = slice(starts[r], starts[r + 1])
            rows.append(
                {
                    "step": step,
                    "prompt": group.prompt_text,
                    "tokens": tokenizer.batch_decode([[i] for i in response.ids]),
                    "process_rewards": None if rewards.values is None else rewards.values[span].tolist(),
                    "advantages": advantages[span].tolist(),
                    "outcome": response.outcome,
                    "reference": group.reference,
                }
            )
    return rows


def _best(group: Group) -> int:
    return max(range(len(group.responses)), key=lambda k: group.responses[k].outcome)


def _worst(group: Group) -> int:
    return min(range(len(group.responses)), key=lambda k: group.responses[k].outcome)
