"""Online PRIME, top to bottom: the only file that knows all stages."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import torch

from .config.run_config import RunConfig
from .data.problems import usable
from .data.tasks import load_task
from .evaluation.held_out import evaluate
from .models import loading, prm_record, tokenizers, traits
from .models.placement import Wanted, load_models
from .rollout import EngineConfig, follow_logits
from .rollout.collector import NothingPasses
from .rollout.pipeline import Rollouts
from .run import checkpoint, hub, unchanged
from .run.metrics import Metrics, MetricsWriter, NoMetrics
from .run.output_lock import output_lock
from .run.progress import progress_bar
from .run.seeds import derive_seed
from .run.stage_clock import StageClock
from .run.stop_signal import stop_signal
from .scale.heartbeat import watched
from .scale.ranks import SINGLE, Ranks, connect
from .scale.transfer import Values, fetched
from .train.advantages import advantages_of
from .train.batch import Batch
from .train.candidates import CandidateTargets, candidate_targets
from .train.examples import examples_of
from .train.importance import importance
from .train.nonfinite_guard import Skips, TooManySkipped, finite
from .train.policy_step import Targets, minibatches_of, policy_update
from .train.prm_step import PRMScorer, PRMScores, Rewards, Scorer, process_rewards
from .train.trainable import Trainable
from .verify import Verifier


@dataclass(frozen=True)
class StepResult:
    """Metrics of a step, a few responses for the report, and the batch that it trained on."""

    metrics: dict[str, float]
    examples: list[dict[str, Any]]
    batch: Batch


class Run:
    """Everything a run holds between two steps."""

    def __init__(self, cfg: RunConfig, ranks: Ranks = SINGLE, started_from: dict[str, str] | None = None) -> None:
        """`started_from` are the fingerprints of the models that the run starts from."""
        self.models = started_from or {}
        self.cfg, self.needs, self.ranks, self.device = cfg, cfg.needs, ranks, loading.device(cfg.model)
        self.tokenizer = tokenizers.load_tokenizer(cfg.model)
        self.task = load_task(cfg.task, cfg.seed)
        self.held_out = usable(self.tokenizer, self.task.held_out(), cfg.task.bad_rows)
        wanted = Wanted(cfg.model, cfg.prm_model, cfg.prm, cfg.scale, self.needs, cfg.seed)
        models = load_models(wanted, ranks, self.tokenizer)
        model, self.ref = models.policy, models.reference
        self.policy = Trainable(model, lr=cfg.policy.lr, grad_clip=cfg.policy.grad_clip, ranks=ranks)
        self.prm: Trainable | None = None
        if models.prm is not None:
            self.prm = Trainable(models.prm, lr=cfg.prm.lr, grad_clip=cfg.prm.grad_clip, ranks=ranks)
        scorer = Scorer(
            model if self.needs.old_logp else None, self.ref, cfg.micro_batch_tokens, cfg.rollout.temperature,
            cfg.algorithm.candidates.min_prob if self.needs.candidates else None,
        )  # fmt: skip
        self.scorer = scorer if self.prm is None else PRMScorer(scorer, self.prm, cfg.prm)
        self.traits = traits.of(model)
        vocabulary = len(model.get_output_embeddings().weight)
        self.step_ends = tokenizers.newline_tokens(self.tokenizer, vocabulary)
        self.verifier = Verifier.from_config(cfg.task)
        engine = EngineConfig(cfg.rollout, cfg.model, cfg.output)
        with ExitStack() as failing:
            failing.callback(self.verifier.close)
            self.rollouts = Rollouts(
                engine, cfg.filter, model, self.tokenizer, self.task, self.verifier,
                seed=cfg.seed, steps=cfg.steps, eval_batch_size=cfg.eval.batch_size, ranks=ranks,
            )  # fmt: skip
            failing.callback(self.rollouts.close)
            said = follow_logits(engine, self.rollouts.sampler, models.all)
            failing.pop_all()
        if said is not None and ranks.first:
            print(said, file=sys.stderr)
        self.skips = Skips(cfg.policy.max_skipped)
        self.fingerprint = tokenizers.TokenizerIdentity.of(self.tokenizer).fingerprint()
        self.step = self._before = 0

    def _updates(self) -> int:
        return self.policy.updates + (0 if self.prm is None else self.prm.updates)

    @property
    def whole(self) -> bool:
        """Whether the weights are those after `step` steps, and not half of the next one's."""
        return self._updates() == self._before

    def state_dict(self) -> dict[str, Any]:
        """Everything a run needs to resume bit for bit; with sharding, each rank has its shards."""
        return {
            "step": self.step,
            "config": self.cfg.model_dump_json(),
            "tokenizer": self.fingerprint,
            "models": self.models,
            "random": self.ranks.gather(checkpoint.random_states()),
            "skips": self.skips.state_dict(),
            "policy": self.policy.state_dict(),
            "prm": None if self.prm is None else self.prm.state_dict(),
            "rollouts": self.rollouts.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        unchanged.check(state["tokenizer"], self.fingerprint, self.fingerprint, "--resume: the tokenizer has changed")
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
            self.held_out, self.tokenizer, sampler, self.verifier,
            max_new_tokens=cfg.rollout.max_new_tokens, temperature=cfg.rollout.temperature, sampled=cfg.eval.sampled,
            ranks=self.ranks,
        ))  # fmt: skip

    def train_step(self) -> StepResult:
        """One PRIME step."""
        cfg, clock = self.cfg, StageClock()
        step, self._before = self.step + 1, self._updates()

        groups, found = self.rollouts.batch(step, clock)
        values: Values = {**found}
        batch = Batch(groups, self.device, self.ranks, self.traits.layout, self.traits.reach)
        shuffle = torch.Generator().manual_seed(derive_seed(cfg.seed, "shuffle", step))
        minibatches = minibatches_of(batch, cfg.policy, shuffle)
        # From here on the host only queues work for the device; it waits where a stage decides something.
        batch.lay_out([*self.scorer.parts(batch), *minibatches], cfg.micro_batch_tokens)
        values["kept_reward"] = batch.outcomes.mean()

        rewards: Rewards | None = None
        beside: CandidateTargets | None = None
        with clock("score" if self.prm is None or cfg.prm.update == "none" else "prm"):
            scores = self.scorer.score(batch)
            if isinstance(scores, PRMScores):
                rewards = process_rewards(scores.log_ratio, batch, cfg.prm, self.step_ends)
                if self.needs.candidates:
                    beside = candidate_targets(batch, scores, cfg.prm.scale, cfg.algorithm.candidates.coef)
            values_of = (None if rewards is None else rewards.values, None if beside is None else beside.advantages)
            usable_scores = finite(scores.old_logp, scores.ref_logp, *values_of)
        values |= scores.metrics
        weights = None
        if scores.old_logp is not None:
            weights, compared = importance(
                scores.old_logp, batch.rollout_logp, cfg.rollout.cap, cfg.rollout.tis, batch.cu_seqlens
            )
            values |= compared
        skipped = 0 if self.prm is None else self.prm.taken_skips()
        if usable_scores:
            advantages = advantages_of(batch, rewards, cfg.algorithm)
            old_logp = scores.old_logp if self.needs.ppo_ratio else None
            with clock("policy"):
                values |= policy_update(
                    self.policy, batch, Targets(advantages, old_logp, scores.ref_logp, weights, beside), cfg.policy,
                    micro_batch_tokens=cfg.micro_batch_tokens, parts=minibatches,
                    lr_scale=min(1.0, step / max(1, cfg.policy.warmup_steps)), temperature=cfg.rollout.temperature,
                )  # fmt: skip
            skipped += self.policy.taken_skips()
        else:
            advantages, skipped = torch.zeros_like(batch.ids, dtype=torch.float32), skipped + 1
        self.step, self._before = step, self._updates()
        values |= self.skips.note(skipped)
        examples = examples_of(batch, rewards, advantages, self.tokenizer)
        return StepResult(fetched(values) | clock.times(), examples, batch)

    def save(self, saver: checkpoint.Saver) -> None:
        """A checkpoint in the middle of what failed: the batch that was not trained on is the next one again."""
        self.rollouts.take_back(self.step + 1)
        saver.save(self.step, self.state_dict())
        saver.wait()

    def close(self) -> None:
        self.rollouts.close()
        self.verifier.close()


def run(cfg: RunConfig) -> Path:
    """Trains until `cfg.steps`, or until Ctrl-C, which leaves a checkpoint; returns the final model's directory."""
    if checkpoint.restarted(cfg):
        cfg = cfg.model_copy(update={"resume": True})
    with connect(cfg.scale, loading.device(cfg.model)) as ranks, watched(ranks), ExitStack() as held:
        ranks.once(lambda: held.enter_context(output_lock(cfg.output, cfg.wait_lock)))
        return _run(cfg, ranks)


def _run(cfg: RunConfig, ranks: Ranks) -> Path:
    if cfg.resume:
        hub.resume(cfg.output)
    start = {"policy": cfg.model, "prm": cfg.prm_model, "reference": cfg.model}
    models = ranks.once(lambda: loading.fingerprints(start))
    found = ranks.once(lambda: checkpoint.resume_point(cfg, models))
    trainer = Run(cfg, ranks, models)
    if found is not None:
        trainer.load_state_dict(checkpoint.load(found, trainer.state_dict(), ranks))
    ranks.once(lambda: checkpoint.write_config(cfg, models))
    saver = checkpoint.Saver(cfg.output, cfg.checkpoint.keep, ranks, saved_step=trainer.step)
    metrics = _metrics(cfg, trainer.step) if ranks.first else NoMetrics()
    try:
        if trainer.step == 0:
            metrics.log("eval", 0, trainer.evaluate())
        with stop_signal() as stop:  # to the last file: a signal must not lose what a step has cost
            _train(trainer, metrics, saver, stop)
            if saver.saved_step != trainer.step:
                saver.save(trainer.step, trainer.state_dict())
            saver.wait()
            loading.save(trainer.policy.model, trainer.tokenizer, cfg.output / "final", ranks)
            if trainer.prm is not None:
                untrained = cfg.prm_model if cfg.prm.update == "none" else None
                beside = prm_record.files(cfg.prm, untrained)
                loading.save(trainer.prm.model, trainer.tokenizer, cfg.output / "prm", ranks, beside)
    except Exception as error:
        if _can_save(trainer, error):
            checkpoint.leave(trainer.step, trainer.whole, lambda: trainer.save(saver))
        raise
    finally:
        saver.close()
        metrics.close()
        trainer.close()
    return cfg.output / "final"


def _train(trainer: Run, metrics: Metrics, saver: checkpoint.Saver, stop: Event) -> None:
    """Steps with their metrics, evaluations and checkpoints, to the last one or to Ctrl-C."""
    cfg, ranks = trainer.cfg, trainer.ranks
    with progress_bar("rl", cfg.steps, trainer.step, shown=ranks.first) as bar:
        while trainer.step < cfg.steps and not ranks.any(stop.is_set()):
            result = trainer.train_step()
            step = trainer.step
            metrics.log("rl", step, result.metrics)
            metrics.samples(step, result.examples)
            trainer.skips.check(step, result.batch, cfg.output)
            bar.advance(f"reward {result.metrics['reward']:.2f}  {result.metrics['time/total']:.0f} s")
            if (cfg.eval.every and step % cfg.eval.every == 0) or step == cfg.steps:
                metrics.log("eval", step, trainer.evaluate())
            if cfg.checkpoint.every and step % cfg.checkpoint.every == 0:
                saver.save(step, trainer.state_dict())
            saver.check()


def _metrics(cfg: RunConfig, step: int) -> MetricsWriter:
    """The record of a run at `step`; a run that resumes at 0 starts over, evaluation included."""
    resume_step = step if step > 0 else -1
    return MetricsWriter(
        cfg.output, resume_step if cfg.resume else None, tracking=cfg.metrics, config=cfg.model_dump(mode="json")
    )


def _can_save(trainer: Run, error: Exception) -> bool:
    """Whether a run that ends with `error` first saves its state."""
    if isinstance(error, checkpoint.CheckpointError):
        return False
    if isinstance(error, TooManySkipped):
        return trainer.step < trainer.cfg.steps  # one of the last step would resume into a finished run
    # Saving is collective, and one of several ranks may have failed alone; NothingPasses is raised on all.
    return trainer.ranks.size == 1 or isinstance(error, NothingPasses)
