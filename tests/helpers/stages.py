"""The stages of a step with a batch of known lengths, and the most bytes of tensors that each has alive at once."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.ranks import RandomVerifier
from prime_kernels._bench.timing import peak_of_tensors
from prime_trainer import loop
from prime_trainer.data.groups import Group, Response
from prime_trainer.rollout import Sampling
from prime_trainer.scale.ranks import SINGLE
from prime_trainer.train.batch import Batch
from prime_trainer.train.policy_step import Targets, minibatches_of, policy_update

PROMPT = 64
"""Tokens of every prompt; responses have `rollout.max_new_tokens`."""


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of this rank's storages, each once."""
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def measure(cfg, ranks=SINGLE) -> dict[str, int]:
    """What a run holds (`held`), and by stage what the stage takes beside it."""
    # Large results lie in memory that PyTorch's allocator knows nothing of (prime_kernels._native.empty).
    known = {"empty": lambda dtype, *shape: torch.empty(shape, dtype=dtype)}
    with (
        patch.object(loop, "Verifier", RandomVerifier),
        patch.multiple("prime_kernels._native", **known),
        patch.multiple("prime_kernels._native.head", **known),
    ):
        return _measure(cfg, ranks)


def _measure(cfg, ranks) -> dict[str, int]:
    run, rollout = loop.Run(cfg, ranks), cfg.rollout

    def least(work: Callable[[], object]) -> int:
        # gloo's threads let go of what they sent when they get to run next; the least of some tries is without that.
        return min(peak_of_tensors(work) for _ in range(5 if ranks.size > 1 else 1))

    found = {"held": bytes_of(_held(run))}
    random = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=random).tolist()

    def sample(sampler, prompts: int, n: int, temperature: float) -> None:
        sampler.stops = torch.tensor([-1])  # every response has its full length
        mine = ranks.share([ids(PROMPT) for _ in range(prompts)])
        sampler.generate(mine, n, Sampling(rollout.max_new_tokens, temperature), list(range(len(mine))))

    found["rollout"] = least(lambda: sample(run.rollouts.sampler, rollout.prompts_per_step, rollout.n, 1.0))
    found["evaluation"] = least(lambda: sample(run.rollouts.evaluating, cfg.task.eval_size, 1, 0.0))
    groups = [
        Group(ids(PROMPT), [Response(ids(rollout.max_new_tokens), float(k % 2)) for k in range(rollout.n)])
        for _ in range(rollout.prompts_per_step)
    ]
    packed, scored = Batch(groups, run.device, ranks), []
    name = "score" if run.prm is None or cfg.prm.update == "none" else "score and PRM update"
    found[name] = least(lambda: scored.append(run.scorer.score(packed)))
    old, ref = scored[0].old_logp if cfg.needs.ppo_ratio else None, scored[0].ref_logp
    targets = Targets(torch.ones(packed.num_tokens), old, ref)
    found["policy update"] = least(lambda: policy_update(
        run.policy, packed, targets, cfg.policy, micro_batch_tokens=cfg.micro_batch_tokens,
        parts=minibatches_of(packed, cfg.policy, random),
    ))  # fmt: skip
    run.close()
    return found


def record(path: str) -> None:
    """As a fault of `ranks.start`: a run that measures its stages and writes what it found, a file a rank."""

    def measured(cfg, ranks):
        Path(f"{path}.{ranks.rank}").write_text(json.dumps(measure(cfg, ranks)))
        return cfg.output

    loop._run = measured


def _held(run) -> Iterable[Tensor]:
    for trained in filter(None, (run.policy, run.prm)):
        yield from (*trained.model.parameters(), *trained.model.buffers(), *trained.master)
        yield from (tensor for states in trained.optimizer.state.values() for tensor in states.values())
    if run.ref is not None:
        yield from (*run.ref.parameters(), *run.ref.buffers())
