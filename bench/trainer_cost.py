"""What passes and stages of the trainer cost: layouts of a forward pass, the PRM stage, PRIME over outcome-only RLOO.

    python bench/trainer_cost.py examples/demo.toml [--rounds 3] [--model.path DIR] ... > cost.md
    python bench/trainer_cost.py examples/demo.toml --lengths 16,128,512 [--prompt-tokens 64] ... > cost.md

Takes the model, the sizes and the seed of a run's configuration, samples one batch with them, and repeats each stage on
that batch, in turn, so that what else runs on the machine falls on all of them alike. Medians of the rounds. With
`--lengths` the batches are random tokens of these lengths, and only what process rewards cost is measured. With one
thread seconds are of this process on the CPU: of the wall's, a machine that others use takes more.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import prime_kernels as pk
from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.data.tasks import load_task
from prime_trainer.loop import StageClock
from prime_trainer.models import loading, tokenizers
from prime_trainer.models.protocols import CausalLM
from prime_trainer.models.traits import Layout
from prime_trainer.rollout import TransformersSampler
from prime_trainer.rollout.collector import Collector
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs
from prime_trainer.train.policy_step import Targets, minibatches_of, policy_update
from prime_trainer.train.prm_step import PRMScorer, Rewards, Scorer, process_rewards
from prime_trainer.train.trainable import Trainable
from prime_trainer.verify import Verifier

ROLLOUT_SHARE = 0.53
"""Of the time of an outcome-only step, where the paper reports +28 % for process rewards (arXiv 2502.01456)."""
LAYOUTS: dict[str, Layout] = {
    "a padded row a response": "rows",
    "a row of groups, each prompt once (the trainer's)": "shared",
    "varlen, block mask": "varlen",
}


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turn(stages: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage in each round, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(rounds + 1):
        for name, stage in stages.items():
            begin = clock()
            stage()
            if number:
                seconds[name].append(clock() - begin)
    return seconds


class Setting:
    """A batch, sampled by the configuration's model or given, and that model as policy, PRM and reference."""

    def __init__(self, cfg: RunConfig, groups: Sequence[Group] | None = None) -> None:
        self.cfg = cfg
        model = loading.load_model(cfg.model)
        self.policy = Trainable(model, lr=1e-12, grad_clip=cfg.policy.grad_clip)
        self.prm = Trainable(loading.load_model(cfg.model), lr=1e-12, grad_clip=cfg.prm.grad_clip)
        self.ref = loading.frozen(loading.load_model(cfg.model))
        self.rollout = 0.0
        self.take(self._sampled(model) if groups is None else groups)

    def take(self, groups: Sequence[Group]) -> None:
        """The groups of all stages from now on."""
        self.groups, self.batch = list(groups), Batch(groups, loading.device(self.cfg.model))

    def _sampled(self, model: CausalLM) -> list[Group]:
        cfg, tokenizer, stages = self.cfg, tokenizers.load_tokenizer(self.cfg.model), StageClock()
        sampler = TransformersSampler(model, tokenizer, batch_size=cfg.rollout.batch_size)
        with Verifier(cfg.task.verify_seconds, cfg.task.verify_workers) as verifier:
            task = load_task(cfg.task, cfg.seed)
            collector = Collector(cfg.rollout, cfg.filter, cfg.seed, task, tokenizer, sampler, verifier)
            groups, _ = collector.collect(1, stages)
        self.rollout = stages.spent["rollout"] + stages.spent["verify"]
        return groups

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
            parts = minibatches_of(batch, cfg.policy, torch.Generator().manual_seed(0))
            policy_update(
                self.policy, batch, targets, cfg.policy, micro_batch_tokens=cfg.micro_batch_tokens, parts=parts
            )

        return work

    def advantages(self) -> None:
        log_ratio = torch.randn(self.batch.num_tokens)
        rewards: Rewards = process_rewards(log_ratio, self.batch, self.cfg.prm, None)
        pk.rloo_advantages(rewards.values, self.batch.outcomes, self.batch.cu_seqlens, self.batch.cu_groups)


def option(words: list[str], name: str, default: str) -> str:
    """Takes an option and its value out of `words`."""
    if name not in words:
        return default
    at = words.index(name)
    value = words[at + 1]
    del words[at : at + 2]
    return value


def main() -> None:
    words = sys.argv[1:]
    rounds, lengths = int(option(words, "--rounds", "3")), option(words, "--lengths", "")
    prompt = int(option(words, "--prompt-tokens", "64"))
    cfg = load(Path(words.pop(0)), words)
    if lengths:
        by_length(cfg, [int(length) for length in lengths.split(",")], prompt, rounds)
    else:
        of_a_batch(cfg, rounds)


def stages_of(setting: Setting) -> dict[str, Callable[[], object]]:
    return {
        "PRM stage, ref_type = freeze": setting.prm_stage("freeze"),
        "PRM stage, ref_type = policy": setting.prm_stage("policy"),
        "scoring of outcome-only RLOO": setting.outcome_stage(),
        "policy forward and backward, update": setting.update(),
    }


def by_length(cfg: RunConfig, lengths: Sequence[int], prompt: int, rounds: int) -> None:
    """Stages and the overhead of process rewards for responses of each length."""
    generator = torch.Generator().manual_seed(0)
    setting: Setting | None = None
    rows = []
    for length in lengths:

        def ids(count: int) -> list[int]:
            return torch.randint(3, 250, (count,), generator=generator).tolist()

        groups = [
            Group(ids(prompt), [Response(ids(length), float(k % 2)) for k in range(cfg.rollout.n)])
            for _ in range(cfg.rollout.prompts_per_step)
        ]
        if setting is None:
            setting = Setting(cfg, groups)
        setting.take(groups)
        found = [statistics.median(s) for s in in_turn(stages_of(setting), rounds).values()]
        freeze, policy, scoring, update = found
        # Rollouts that take ROLLOUT_SHARE of the outcome-only step leave this much of an extra to the whole step.
        extras = [(stage - scoring) / (scoring + update) for stage in (freeze, policy)]
        shares = [f"+{extra:.0%}" for extra in (*extras, *((1 - ROLLOUT_SHARE) * extra for extra in extras))]
        rows.append([str(length), *(f"{value:.2f}" for value in found), *shares])
    print(
        f"{cfg.model.path}, {cfg.model.dtype}, {torch.get_num_threads()} thread(s): {cfg.rollout.prompts_per_step} "
        f"groups of {cfg.rollout.n}, prompts of {prompt} tokens, passes of {cfg.micro_batch_tokens}; medians of "
        f"{rounds} rounds in turn. Overheads of process rewards over outcome-only RLOO: without rollouts, and by "
        f"calculation where rollouts take {ROLLOUT_SHARE:.0%} of the outcome-only step\n"
    )
    head = ["tokens", "PRM, freeze s", "PRM, policy s", "outcome-only scoring s", "policy update s"]
    head += [
        f"{name}, {where}"
        for where in ("no rollouts", f"{ROLLOUT_SHARE:.0%} rollouts")
        for name in ("freeze", "policy")
    ]
    for row in [head, ["--:"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")


def of_a_batch(cfg: RunConfig, rounds: int) -> None:
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
    stages = stages_of(setting) | {"advantages": setting.advantages}
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
