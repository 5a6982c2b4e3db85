"""A PRIME step of full fine-tuning against adapters: resident memory, and seconds by stage.

usage: python bench/adapters.py measure RESULTS.json [RUN.toml] [--rank 64] [--steps 2] [--arms full,adapters] [--KEY]
       python bench/adapters.py table RESULTS.json bench/results/adapters

Each arm is a process of its own, from the same weights and seed: with B = 0 the first step of both samples and trains
on the same responses. Every group passes the filter. Resident memory is the most during each stage (VmHWM, reset before
it), and that before the steps. Seconds of the processor (all threads) tell more than those of the clock where other
work shares the machine. `measure` adds to what RESULTS.json has, so arms may be measured one by one; an allocator
that LD_PRELOAD names is that of the arms, and is recorded, as are the variables ENVIRONMENT and the tiles of a tuning
file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prime_kernels import _tuning
from prime_trainer import loop
from prime_trainer.config.load import load
from prime_trainer.models import compiled_products
from prime_trainer.run.provenance import environment
from prime_trainer.run.stage_clock import StageClock

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("rollout", "prm", "policy", "total")
HELD = STAGES[:-1]
"""Stages whose memory is measured."""
ENVIRONMENT = ("MALLOC_CONF", *compiled_products.CAPACITIES)
"""Variables that bound what stays with a process; the trainer sets those of compiled products itself."""
OPEN = ["--filter.low", "0", "--filter.high", "1", "--rollout.engine", "transformers", "--model.device", "cpu"]


def resident(name: str) -> float:
    """GB of this process: VmRSS now, VmHWM at most since the last `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e9 for line in lines if line.startswith(name))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class _Peaks(StageClock):
    """Also keeps the most resident memory of each stage, in GB."""

    def __init__(self) -> None:
        super().__init__()
        self.most = dict.fromkeys(HELD, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        forget_peak()
        with super().__call__(stage):
            yield
        if stage in self.most:
            self.most[stage] = max(self.most[stage], resident("VmHWM"))

    def times(self) -> dict[str, float]:
        return super().times() | {f"most/{stage}": most for stage, most in self.most.items()}


def one(toml: Path, steps: int, words: list[str]) -> list[dict[str, object]]:
    """A row a step."""
    loop.StageClock = _Peaks  # type: ignore[misc]
    cfg = load(toml, [*OPEN, *words])
    trainer = loop.Run(cfg)
    held, rows = resident("VmRSS"), []
    trained = [each for each in (trainer.policy, trainer.prm) if each is not None]
    masters = sum(master.numel() for each in trained for master in each.master)
    tuning = _tuning.active("cpu")
    tiles = [] if tuning is None else [f"{name}={size}" for name, size in tuning.tiles.items()]
    set_here = [name for name in ENVIRONMENT if name in os.environ]
    how = {
        "pass tokens": cfg.micro_batch_tokens, "checkpointing": cfg.scale.activation_checkpointing,
        "allocator": Path(os.environ.get("LD_PRELOAD", "")).name or "libc",
        "environment": ", ".join([*(f"{name}={os.environ[name]}" for name in set_here), *tiles]),
    }  # fmt: skip
    try:
        for _ in range(steps):
            began = time.process_time()
            values = trainer.train_step().metrics
            row = {"cpu s": time.process_time() - began} | {f"{stage} s": values[f"time/{stage}"] for stage in STAGES}
            most = {f"{stage} GB": values[f"most/{stage}"] for stage in HELD}
            row |= {"tokens": values["tokens"], "trained": masters, "held GB": held, "most GB": max(most.values())}
            rows.append({"step": trainer.step} | how | row | most)
    finally:
        trainer.close()
    return rows


def measure(target: Path, toml: Path, rank: int, steps: int, arms: list[str], words: list[str]) -> None:
    found = json.loads(target.read_text()) if target.exists() else {"environment": environment(), "rows": []}
    for arm in arms:
        own = words if arm == "full" else [*words, "--model.adapter.rank", str(rank)]
        asked = [sys.executable, __file__, "one", str(toml), str(steps), *own]
        said = subprocess.run(asked, stdout=subprocess.PIPE, check=True, text=True).stdout
        name = "full" if arm == "full" else f"rank {rank}"
        for row in json.loads(said.splitlines()[-1]):
            found["rows"].append({"arm": name, **row})
            print(found["rows"][-1], flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(found, indent=1) + "\n")


def table(source: Path, folder: Path) -> None:
    """The least time of each stage over an arm's steps, as other work on the machine only adds to it."""
    rows = json.loads(source.read_text())["rows"]
    named = ("arm", "pass tokens", "checkpointing", "allocator", "environment")
    memory = ("held", *HELD, "most")
    head = [*named, "trained", *(f"{kind} GB" for kind in memory), *(f"{stage} s" for stage in STAGES), "processor s"]
    lines = [f"| {' | '.join([*head, 'steps'])} |", "|---" * len(named) + "|" + "--:|" * (len(head) + 1 - len(named))]
    for arm in dict.fromkeys(tuple(row[name] for name in named) for row in rows):
        mine = [row for row in rows if tuple(row[name] for name in named) == arm]
        times = [min(row[f"{stage} s"] for row in mine) for stage in (*STAGES, "cpu")]
        most = [max(row[f"{kind} GB"] for row in mine) for kind in memory]
        cells = [*map(str, arm), f"{mine[0]['trained']:,}", *(f"{value:.2f}" for value in most)]
        lines.append(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in times), str(len(mine))])} |")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("results", type=Path)
    parser.add_argument("where", type=Path, nargs="?", default=ROOT / "examples" / "demo.toml")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--arms", default="full,adapters")
    args, words = parser.parse_known_args()
    if args.command == "table":
        table(args.results, args.where)
    else:
        measure(args.results, args.where, args.rank, args.steps, args.arms.split(","), words)


if __name__ == "__main__":
    main()
