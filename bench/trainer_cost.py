"""What passes and stages of the trainer cost: layouts of a forward pass, the PRM stage, PRIME over outcome-only RLOO.

    python bench/trainer_cost.py examples/demo.toml [--rounds 3] [--model.path DIR] ... > cost.md
    python bench/trainer_cost.py examples/demo.toml --lengths 16,128,512 [--prompt-tokens 64] [--rank 64] ... > cost.md

Takes the model, the sizes and the seed of a run's configuration, samples one batch with them, and repeats each stage on
that batch, in turn, so that what else runs on the machine falls on all of them alike. Medians of the rounds. With
`--lengths` the batches are random tokens of these lengths, and whole steps of the trainer are taken, recomputation
and optimizers included: without process rewards, with either reference, and with adapters. With one thread
seconds are of this process on the CPU: of the wall's, a machine that others use takes more.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

import prime_kernels as pk
from prime_trainer import loop
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
_OUTCOMES = ["--algorithm.process_coef", "0", "--algorithm.whiten", "false"]
_ADAPTER = ["--model.adapter.rank"]
"""Its value is the script's option."""
WAYS = {
    "outcomes alone": _OUTCOMES,
    "`freeze`": ["--prm.ref_type", "freeze"],
    "`policy`": ["--prm.ref_type", "policy"],
    "adapters, outcomes alone": [*_OUTCOMES, *_ADAPTER],
    "adapters, `freeze`": ["--prm.ref_type", "freeze", *_ADAPTER],
}
BESIDE = {"`freeze`": "outcomes alone", "`policy`": "outcomes alone", "adapters, `freeze`": "adapters, outcomes alone"}
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
    """A batch, sampled by the configuration's model, and that model as policy, PRM and reference."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        model = loading.load_model(cfg.model)
        self.policy = Trainable(model, lr=1e-12, grad_clip=cfg.policy.grad_clip)
        self.prm = Trainable(loading.load_model(cfg.model), lr=1e-12, grad_clip=cfg.prm.grad_clip)
        self.ref = loading.frozen(loading.load_model(cfg.model))
        self.rollout = 0.0
        self.groups = self._sampled(model)
        self.batch = Batch(self.groups, loading.device(cfg.model))

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
    prompt, rank = int(option(words, "--prompt-tokens", "64")), option(words, "--rank", "64")
    toml = Path(words.pop(0))
    if lengths:
        by_length(toml, words, [int(length) for length in lengths.split(",")], prompt, rounds, rank)
    else:
        of_a_batch(load(toml, words), rounds)


def stages_of(setting: Setting) -> dict[str, Callable[[], object]]:
    return {
        "PRM stage, ref_type = freeze": setting.prm_stage("freeze"),
        "PRM stage, ref_type = policy": setting.prm_stage("policy"),
        "scoring of outcome-only RLOO": setting.outcome_stage(),
        "policy forward and backward, update": setting.update(),
    }


class _Spent(StageClock):
    """Seconds by `clock`."""

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        begin = clock()
        yield
        self.spent[stage] = self.spent.get(stage, 0.0) + clock() - begin


def by_length(toml: Path, words: Sequence[str], lengths: Sequence[int], prompt: int, rounds: int, rank: str) -> None:
    """Stages of steps and the overhead of process rewards for responses of each length."""
    loop.StageClock = _Spent  # type: ignore[misc]
    spent: dict[tuple[str, int], list[float]] = {}
    for way, own in WAYS.items():
        with tempfile.TemporaryDirectory() as folder:
            ranks = [rank] if own[-1:] == _ADAPTER else []
            cfg = load(toml, [*words, *own, *ranks, "--output", folder])
            run = loop.Run(cfg)
            for length in lengths:
                generator = torch.Generator().manual_seed(length)
                groups = random_groups(cfg, length, prompt, generator)
                run.rollouts.batch = lambda step, clock: (groups, {})  # type: ignore[method-assign]  # noqa: B023
                found = [run.train_step().metrics for _ in range(rounds + 1)][1:]
                spent[way, length] = [
                    statistics.median(sum(row.get(f"time/{stage}", 0.0) for stage in stages) for row in found)
                    for stages in (("score", "prm"), ("policy",))
                ]
            run.close()
            del run  # before the next way's models are made
    print(
        f"{cfg.model.path}, {cfg.model.dtype}, {torch.get_num_threads()} thread(s): {cfg.rollout.prompts_per_step} "
        f"groups of {cfg.rollout.n}, prompts of {prompt} tokens, passes of {cfg.micro_batch_tokens}, "
        f"{cfg.policy.minibatches} minibatch(es); medians of {rounds} rounds. Overheads of process rewards: without "
        f"rollouts, and by calculation where rollouts take {ROLLOUT_SHARE:.0%} of the outcome-only step\n"
    )
    head = ["tokens", "step", "scores and PRM s", "policy s", "overhead", f"at {ROLLOUT_SHARE:.0%} rollouts"]
    rows = []
    for length in lengths:
        for way in WAYS:
            mine, shares = spent[way, length], ["-", "-"]
            if way in BESIDE:
                extra = sum(mine) / sum(spent[BESIDE[way], length]) - 1
                # Rollouts that take ROLLOUT_SHARE of the outcome-only step leave this much of an extra to it.
                shares = [f"{share:+.0%}" for share in (extra, (1 - ROLLOUT_SHARE) * extra)]
            rows.append([str(length), way, *(f"{value:.2f}" for value in mine), *shares])
    for row in [head, ["--:", "---", *["--:"] * 4], *rows]:
        print("| " + " | ".join(row) + " |")


def random_groups(cfg: RunConfig, length: int, prompt: int, generator: torch.Generator) -> list[Group]:
    def ids(count: int) -> list[int]:
        return torch.randint(3, 250, (count,), generator=generator).tolist()

    return [
        Group(ids(prompt), [Response(ids(length), float(k % 2), [-1.0] * length) for k in range(cfg.rollout.n)])
        for _ in range(cfg.rollout.prompts_per_step)
    ]


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
