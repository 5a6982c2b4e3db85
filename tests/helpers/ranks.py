"""Whole runs in processes of their own, forked from one that has imported everything: seconds instead of half a minute.

The verifier is the random one of the loop's tests. A fault is the name of a function of `faults` to call first.
"""

import json
import multiprocessing
import os
import random
import socket
import sys
from pathlib import Path

import pytest
import torch.distributed.checkpoint
import torch.distributed.fsdp
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

from prime_trainer import cli, loop
from prime_trainer.config.run_config import RunConfig
from prime_trainer.data import tasks  # noqa: F401
from prime_trainer.verify import Verdict

torch.set_num_threads(1)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["helpers.ranks"])


class RandomVerifier:
    """Scores a text by its bytes: both outcomes occur, and the same text always has the same."""

    @classmethod
    def from_config(cls, _cfg):
        return cls()

    def score(self, items):
        return [Verdict(float(random.Random(text).random() < 0.5), None) for _, text in items]

    def close(self):
        pass


def start(cfg, ranks: int, fault=None, *arguments, command="rl") -> list:
    """One process a rank, with torchrun's environment (none for `ranks` = 0), output into OUTPUT.rankN.log.

    `fault(*arguments)` is called in each process before the run.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
    port, processes = _free_port(), []
    for rank in range(max(1, ranks)):
        env = {}
        if ranks:
            env = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            env |= {"MASTER_PORT": port}
        words = (
            cfg.model_dump_json(),
            {k: str(v) for k, v in env.items()},
            str(log(cfg, rank)),
            fault,
            arguments,
            command,
        )
        processes.append(context.Process(target=_child, args=words))
        processes[-1].start()
    return processes


def warm() -> None:
    """Waits until everything is imported: what is timed afterwards is a run alone."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    process = context.Process(target=int)
    process.start()
    process.join()


def log(cfg, rank: int = 0) -> Path:
    return Path(f"{cfg.output}.rank{rank}.log")


def wait(processes, seconds: float = 200) -> list[int]:
    """Exit statuses; nothing is left running."""
    try:
        for process in processes:
            process.join(seconds)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


def train(cfg, ranks: int, fault=None, *arguments, command="rl") -> None:
    """A whole run; fails with the ranks' output."""
    codes = wait(start(cfg, ranks, fault, *arguments, command=command))
    assert codes == [0] * len(codes), "\n".join(f"{codes} {log(cfg, r).read_text()[-3000:]}" for r in range(len(codes)))


def rows(path):
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("stage"), {k: v for k, v in line.items() if not k.startswith("time")}) for line in lines]


def assert_close_runs(a, b, tolerance=1e-5):
    first, second = rows(a), rows(b)
    assert len(first) == len(second)
    for (stage, one), (other_stage, other) in zip(first, second, strict=True):
        assert stage == other_stage and one == pytest.approx(other, abs=tolerance, rel=tolerance)
    assert (a / "prm").exists() == (b / "prm").exists()
    for name in ("final", "prm") if (a / "prm").exists() else ("final",):
        one, other = (load_file(path / name / "model.safetensors") for path in (a, b))
        assert one.keys() == other.keys()
        assert max((one[key] - other[key]).abs().max().item() for key in one) <= tolerance
        assert max((one[key] - other[key]).abs().mean().item() for key in one) <= 0.01 * tolerance


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _child(config, env, out, fault, arguments, command):
    with open(out, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    loop.Verifier = RandomVerifier
    cli._config = lambda words: RunConfig(**json.loads(config))
    if fault is not None:
        fault(*arguments)
    status = cli.main([command])
    sys.stdout.flush()
    # What remains of torch's threads now and then aborts a process on its ordinary way out, after all is done.
    os._exit(status)
