"""Online PRIME, top to bottom: the only file that knows all stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import prime_kernels as pk

from .config.run_config import RunConfig
from .data.groups import Group
from .data.tasks import load_task
from .errors import RunError
from .evaluation.held_out import evaluate
from .models import forward, loading, tokenizers
from .models.placement import load_placed
from .models.protocols import CausalLM, Tokenizer
from .rollout.collector import NothingPasses
from .rollout.pipeline import Rollouts
from .run import checkpoint
from .run.metrics import MetricsWriter, NoMetrics
from .run.progress import progress_bar
from .run.seeds import derive_seed
from .run.stage_clock import Clock
from .run.stop_signal import stop_signal
from .scale.heartbeat import watched
from .scale.ranks import SINGLE, Ranks, connect
from .train.batch import Batch
from .train.importance import importance
from .train.nonfinite_guard import Skips, TooManySkipped, finite
from .train.policy_step import needs_old_logp, policy_update
from .train.prm_step import Rewards, Scorer, process_rewards
from .train.trainable import Trainable
from .verify import Verifier


class Run:
    """Everything a run holds between two steps."""

    def __init__(self, cfg: RunConfig, ranks: Ranks = SINGLE) -> None:
        self.cfg, self.ranks, self.device = cfg, ranks, loading.device(cfg.model)
        self.tokenizer = tokenizers.load_tokenizer(cfg.model)
        self.task = load_task(cfg.task, cfg.seed)
        model = load_placed(cfg, ranks, "policy")
        self.policy = Trainable(model, lr=cfg.policy.lr, grad_clip=cfg.policy.grad_clip, ranks=ranks)
        dense = cfg.algorithm.process_coef > 0
        self.prm = self.ref = None
        if dense:
            prm = load_placed(cfg, ranks, "prm")
            self.prm = Trainable(prm, lr=cfg.prm.lr, grad_clip=cfg.prm.grad_clip, ranks=ranks)
        if cfg.policy.kl_coef > 0 or (dense and cfg.prm.ref_type == "freeze"):
            self.ref = load_placed(cfg, ranks, "reference")
        # An engine's log-probs are not quite the trainer's; those of transformers differ by rounding alone.
        compares = cfg.rollout.engine != "transformers" or cfg.rollout.tis_cap > 0
        old_wanted = needs_old_logp(cfg.policy) or (dense and cfg.prm.ref_type == "policy") or compares
        self.scorer = Scorer(
            model if old_wanted else None, self.ref, self.prm, cfg.prm, cfg.micro_batch_tokens, cfg.rollout.temperature
        )
        self.step_ends = _newline_tokens(self.tokenizer, model).to(self.device)
        self.verifier = Verifier.from_config(cfg.task)
        try:
            self.rollouts = Rollouts(cfg, model, self.tokenizer, self.task, self.verifier, ranks)
        except BaseException:
            self.verifier.close()
            raise
        self.skips, self.fingerprint = Skips(cfg.policy.max_skipped), tokenizers.tokenizer_fingerprint(self.tokenizer)
        self.step = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to go on bit for bit; with shards, every rank has its own."""
        return {
            "step": self.step,
            "config": self.cfg.model_dump_json(),
            "tokenizer": self.fingerprint,
            "random": self.ranks.gather(checkpoint.random_states()),
            "skips": self.skips.state_dict(),
            "policy": self.policy.state_dict(),
            "prm": None if self.prm is None else self.prm.state_dict(),
            "rollouts": self.rollouts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        checkpoint.same_tokenizer(state["tokenizer"], self.fingerprint)
        checkpoint.set_random_states(state["random"][self.ranks.rank % len(state["random"])])
        self.skips.load_state_dict(state["skips"])
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
            ranks=self.ranks,
        ))  # fmt: skip

    def train_step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """One PRIME step; its metrics, and a few responses for the report."""
        cfg, algorithm, clock = self.cfg, self.cfg.algorithm, Clock()
        step = self.step + 1

        groups, values = self.rollouts.batch(step, clock)
        batch = self.batch = Batch(groups, self.device, self.ranks, forward.reads_stream(self.policy.model))
        values["kept_reward"] = batch.outcomes.mean().item()

        with clock("score" if self.prm is None or cfg.prm.update == "none" else "prm"):
            scores = self.scorer.score(batch)
        values |= scores.metrics
        weights = None
        if scores.old_logp is not None:
            weights, compared = importance(scores.old_logp, batch.rollout_logp, cfg.rollout.tis_cap)
            values |= compared

        rewards = Rewards(None, None)
        if self.prm is not None:
            rewards = process_rewards(scores.log_ratio, batch, cfg.prm, self.step_ends)
        skipped = 0 if self.prm is None else self.prm.taken_skips()
        if finite(scores.old_logp, scores.ref_logp, rewards.values):
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
            skipped += self.policy.taken_skips()
        else:
            advantages, skipped = torch.zeros_like(batch.ids, dtype=torch.float32), skipped + 1
        self.step = step
        values |= self.skips.note(skipped)
        return values | clock.times(), _examples(step, batch, rewards, advantages, self.tokenizer)

    def close(self) -> None:
        self.rollouts.close()
        self.verifier.close()


def run(cfg: RunConfig) -> Path:
    """Trains until `cfg.steps`, or until Ctrl-C, which leaves a checkpoint; returns the final model's directory."""
    cfg = checkpoint.restarted(cfg)
    with connect(cfg.scale, loading.device(cfg.model)) as ranks, watched(ranks):
        return _run(cfg, ranks)


def _run(cfg: RunConfig, ranks: Ranks) -> Path:
    found = ranks.once(lambda: checkpoint.resume_point(cfg))
    trainer = Run(cfg, ranks)
    if found is not None:
        trainer.load_state_dict(checkpoint.load(found, trainer.state_dict(), ranks))
    ranks.once(lambda: checkpoint.write_config(cfg))
    metrics, saver = NoMetrics(), checkpoint.Saver(cfg.output, cfg.checkpoint.keep, ranks)
    if ranks.first:
        resumed = (trainer.step or -1) if cfg.resume else None  # at 0 the run starts anew, evaluation included
        metrics = MetricsWriter(cfg.output, resume_step=resumed)
    saved = trainer.step
    try:
        if trainer.step == 0:
            metrics.log("eval", 0, trainer.evaluate())
        with progress_bar("rl", cfg.steps, trainer.step, shown=ranks.first) as bar, stop_signal() as stop:
            while trainer.step < cfg.steps and not ranks.any(stop.is_set()):
                values, examples = trainer.train_step()
                step = trainer.step
                metrics.log("rl", step, values)
                metrics.samples(step, examples)
                trainer.skips.check(step, trainer.batch, cfg.output)
                bar.advance(f"reward {values['reward']:.2f}  {values['time/total']:.0f} s")
                if (cfg.eval.every and step % cfg.eval.every == 0) or step == cfg.steps:
                    metrics.log("eval", step, trainer.evaluate())
                if cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
                    saver.save(step, trainer.state_dict())
                    saved = step
                saver.check()
        if saved != trainer.step:
            saver.save(trainer.step, trainer.state_dict())
        saver.wait()
        loading.save(trainer.policy.model, trainer.tokenizer, cfg.output / "final", ranks)
        if trainer.prm is not None:
            loading.save(trainer.prm.model, trainer.tokenizer, cfg.output / "prm", ranks)
    except checkpoint.CheckpointError:
        raise
    except RunError as error:
        # Of several ranks one may have failed alone, and a checkpoint takes all of them.
        together = ranks.size == 1 or isinstance(error, (NothingPasses, TooManySkipped))
        # A checkpoint of the last step would resume into a finished run.
        if together and not (isinstance(error, TooManySkipped) and trainer.step == cfg.steps):
            saver.save(trainer.step, trainer.state_dict())
            saver.wait()
        raise
    finally:
        saver.close()
        metrics.close()
        trainer.close()
    return cfg.output / "final"


def _newline_tokens(tokenizer: Tokenizer, model: CausalLM) -> torch.Tensor:
    """bool [V]: tokens whose text has a line break end a step."""
    size = model.get_output_embeddings().weight.shape[0]
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))])
    ends = torch.zeros(size, dtype=torch.bool)
    ends[: len(texts)] = torch.tensor(["\n" in t for t in texts])
    return ends


def _examples(
    step: int, batch: Batch, rewards: Rewards, advantages: torch.Tensor, tokenizer: Tokenizer, count: int = 2
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
