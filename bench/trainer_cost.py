"""What passes and stages of the trainer cost: layouts of a forward pass, the PRM stage, PRIME over outcome-only RLOO.

    python bench/trainer_cost.py examples/demo.toml [--rounds 3] [--model.path DIR] ... > cost.md

Takes the model, the sizes and the seed of a run's configuration, samples one batch with them, and repeats each stage on
that batch, in turn, so that what else runs on the machine falls on all of them alike. Medians of the rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import prime_kernels as pk
from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.loop import StageClock
from prime_trainer.models import loading, tokenizers
from prime_trainer.models.traits import Layout
from prime_trainer.rollout import TransformersSampler
from prime_trainer.rollout.collector import Collector
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs
from prime_trainer.train.policy_step import Targets, policy_update
from prime_trainer.train.prm_step import PRMScorer, Rewards, Scorer, process_rewards
from prime_trainer.train.trainable import Trainable
from prime_trainer.verify import Verifier

LAYOUTS: dict[str, Layout] = {
    "a padded row a response": "rows",
    "a row of groups, each prompt once (the trainer's)": "shared",
    "varlen, block mask": "varlen",
}


def in_turn(stages: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage in each round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, stage in stages.items():
            begin = time.perf_counter()
            stage()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


class Setting:
    """A batch sampled by the configuration's model, and that model as policy, PRM and reference."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        tokenizer = tokenizers.load_tokenizer(cfg.model)
        model = loading.load_model(cfg.model)
        self.policy = Trainable(model, lr=1e-12, grad_clip=cfg.policy.grad_clip)
        self.prm = Trainable(loading.load_model(cfg.model), lr=1e-12, grad_clip=cfg.prm.grad_clip)
        self.ref = loading.frozen(loading.load_model(cfg.model))
        sampler = TransformersSampler(model, tokenizer, batch_size=cfg.rollout.batch_size)
        with Verifier(cfg.task.verify_seconds, cfg.task.verify_workers) as verifier:
            task = load_task(cfg.task, cfg.seed)
            collector = Collector(cfg.rollout, cfg.filter, cfg.seed, task, tokenizer, sampler, verifier)
            clock = StageClock()
            self.groups, _ = collector.collect(1, clock)
        self.rollout = clock.spent["rollout"] + clock.spent["verify"]
        self.batch = Batch(self.groups, loading.device(cfg.model))

    def forward(self, layout: str) -> Callable[[], None]:
        """A forward pass of the policy over the batch."""
        batch = Batch(self.groups, self.batch.device, layout=LAYOUTS[layout])

        @torch.no_grad()
        def work() -> None:
            for micro in batch.micro_batches(range(len(self.groups)), self.cfg.micro_batch_tokens):
                log_probs(self.policy.model, micro, batch.ids[micro.tokens])

        return work

    def prm_stage(self, ref_type: str) -> Callable[[], object]:
        """The PRM's scoring and update; with `policy` the policy's own log-probs, at hand or not, are the reference."""
        scorer = Scorer(
            self.policy.model if ref_type == "policy" or self.cfg.needs.ppo_ratio else None,
            self.ref if ref_type == "freeze" else None, self.cfg.micro_batch_tokens,
        )  # fmt: skip
        with_prm = PRMScorer(scorer, self.prm, self.cfg.prm)
        return lambda: with_prm.score(self.batch)

    def outcome_stage(self) -> Callable[[], object]:
        """What outcome-only RLOO does in its place: the policy's own log-probs where its update needs them."""
        wanted = self.policy.model if self.cfg.needs.ppo_ratio else None
        return lambda: Scorer(wanted, None, self.cfg.micro_batch_tokens).score(self.batch)

    def update(self) -> Callable[[], object]:
        """The policy's update: forward and backward of every token, and the optimizer steps."""
        cfg, batch = self.cfg, self.batch
        advantages = torch.randn(batch.num_tokens)
        targets = Targets(advantages, torch.zeros(batch.num_tokens) if cfg.needs.ppo_ratio else None)

        def work() -> None:
            shuffle = torch.Generator().manual_seed(0)
            policy_update(
                self.policy, batch, targets, cfg.policy, micro_batch_tokens=cfg.micro_batch_tokens, generator=shuffle
            )

        return work

    def advantages(self) -> None:
        log_ratio = torch.randn(self.batch.num_tokens)
        rewards: Rewards = process_rewards(log_ratio, self.batch, self.cfg.prm, None)
        pk.rloo_advantages(rewards.values, self.batch.outcomes, self.batch.cu_seqlens, self.batch.cu_groups)


def main() -> None:
    words = sys.argv[1:]
    rounds = 3
    if "--rounds" in words:
        at = words.index("--rounds")
        rounds = int(words[at + 1])
        del words[at : at + 2]
    cfg = load(Path(words.pop(0)), words)
    setting = Setting(cfg)
    tokens = setting.batch.num_tokens
    prompts = sum(len(group.prompt_ids) for group in setting.groups)
    print(
        f"{cfg.model.path}, {cfg.model.dtype}, {torch.get_num_threads()} threads: {len(setting.groups)} groups of "
        f"{cfg.rollout.n}, {tokens} response tokens, {prompts} prompt tokens, passes of {cfg.micro_batch_tokens}; "
        f"medians of {rounds} rounds in turn\n"
    )
    print("| layout of a forward pass | s | response tokens/s | ratio |\n|---|--:|--:|--:|")
    passes = {
        name: statistics.median(s) for name, s in in_turn({n: setting.forward(n) for n in LAYOUTS}, rounds).items()
    }
    padded = next(iter(passes.values()))
    for name, seconds in passes.items():
        print(f"| {name} | {seconds:.2f} | {tokens / seconds:.0f} | {padded / seconds:.2f} |")
    stages = {
        "PRM stage, ref_type = freeze": setting.prm_stage("freeze"),
        "PRM stage, ref_type = policy": setting.prm_stage("policy"),
        "scoring of outcome-only RLOO": setting.outcome_stage(),
        "policy forward and backward, update": setting.update(),
        "advantages": setting.advantages,
    }
    found = {name: statistics.median(s) for name, s in in_turn(stages, rounds).items()}
    print("\n| stage | s |\n|---|--:|")
    print(f"| rollout and verification (once) | {setting.rollout:.2f} |")
    for name, seconds in found.items():
        print(f"| {name} | {seconds:.2f} |")
    plain = setting.rollout + found["scoring of outcome-only RLOO"] + found["policy forward and backward, update"]
    print("\n| PRIME over outcome-only RLOO | whole step | without rollouts |\n|---|--:|--:|")
    for kind in ("freeze", "policy"):
        extra = found[f"PRM stage, ref_type = {kind}"] - found["scoring of outcome-only RLOO"]
        print(f"| ref_type = {kind} | +{extra / plain:.0%} | +{extra / (plain - setting.rollout):.0%} |")


if __name__ == "__main__":
    main()
