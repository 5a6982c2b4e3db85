"""What can go wrong in a run, each called in the run's process before it starts (see ranks.start)."""

import dataclasses
import itertools
import os
import resource
import signal
import threading
import time

import torch

from prime_trainer import loop, rollout
from prime_trainer.models import loading
from prime_trainer.rollout import EngineDied, TransformersSampler
from prime_trainer.rollout.vllm import server_sampler
from prime_trainer.run import checkpoint, checkpoint_files


def kill_after(seconds: float) -> None:
    """SIGKILL at a moment that nothing in the run chooses."""

    def kill():
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()


def kill_in_checkpoint(step: int, where: str) -> None:
    """SIGKILL while the checkpoint of `step` is being written: `tensors`, `sealed` or `renamed`."""
    write, rename = checkpoint_files.write, checkpoint.Path.rename

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def watched_write(directory, plain, tensors, ranks):
        if plain["step"] == step and where == "tensors":
            (directory / "__0_0.distcp").write_bytes(b"half")
            die()
        write(directory, plain, tensors, ranks)
        if plain["step"] == step and where == "sealed":
            die()

    def watched_rename(path, target):
        result = rename(path, target)
        if where == "renamed" and path.name == f".step_{step:06d}.partial":
            die()
        return result

    checkpoint_files.write = watched_write
    checkpoint.Path.rename = watched_rename


def file_size_limit(size: int, step: int) -> None:
    """From the checkpoint of `step` on no file may grow past `size` bytes: what a full disk does, and `ulimit -f`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = checkpoint.Saver.save

    def limited(self, number, state):
        if number == step:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        save(self, number, state)

    checkpoint.Saver.save = limited


def nan_advantages(steps: list[int]) -> None:
    """The gradient of these steps is not finite."""
    update = loop.policy_update

    def poisoned(policy, batch, targets, *rest, **options):
        poisoned.calls += 1
        if poisoned.calls in steps:
            targets = dataclasses.replace(targets, advantages=targets.advantages * torch.nan)
        return update(policy, batch, targets, *rest, **options)

    poisoned.calls = 0
    loop.policy_update = poisoned


def _around_scores(meddle) -> None:
    """`meddle(call, scores, batch)`, counted from 1, decides what a step's scoring gives; `scores()` makes it."""
    calls = itertools.count(1)
    for scorer in (loop.Scorer, loop.PRMScorer):

        def meddled(self, batch, score=scorer.score):
            return meddle(next(calls), lambda: score(self, batch), batch)

        scorer.score = meddled


def nan_scores(steps: list[int]) -> None:
    """The PRM's log-probs of these steps are not finite."""

    def poisoned(call, score, batch):
        scores = score()
        if call in steps:
            scores.prm_logp[0] = torch.nan
        return scores

    _around_scores(poisoned)


def die_at(rank: int, step: int) -> None:
    """One of the ranks is killed in the middle of a step."""

    def dying(call, score, batch):
        if call == step and batch.ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return score()

    _around_scores(dying)


def quick_watch(seconds: float, rank: int, step: int) -> None:
    """As `die_at`, with ranks that take one another for dead sooner."""
    watched = loop.watched
    loop.watched = lambda ranks: watched(ranks, seconds)
    die_at(rank, step)


def terminate_at(step: int) -> None:
    """SIGTERM from outside in the middle of a step."""

    def terminated(call, score, batch):
        if call == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return score()

    _around_scores(terminated)


def one_engine(deaths: list[int]) -> None:
    """In the place of vLLM's server a copy of the model in the first rank's process; it dies in the calls `deaths`."""
    rollout.vllm_installed = lambda: True
    server_sampler.ServerSampler = type("Counted", (Copy,), {"deaths": set(deaths), "calls": 0})


class Copy(TransformersSampler):
    """Has the weights that it was sent and no others."""

    def __init__(self, cfg, model, tokenizer):
        assert os.environ.get("RANK", "0") == "0"
        copy = loading.load_model(cfg.model)
        super().__init__(copy, tokenizer, batch_size=cfg.rollout.batch_size)
        self.restart()

    def generate(self, *asked):
        self._count()
        assert self.usable
        return super().generate(*asked)

    def update_weights(self, named_tensors, version):
        self._count()
        tensors = dict(named_tensors)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(tensors.pop(name))
        assert not tensors
        self.version, self.usable = version, True

    def restart(self):
        self.version, self.usable = -1, False
        for parameter in self.model.parameters():
            parameter.data.fill_(torch.nan)

    def _count(self):
        type(self).calls += 1
        if self.calls in self.deaths:
            self.usable = False
            raise EngineDied(f"died in call {self.calls}")
