"""What the operations between log-probs and backward take of a PRIME step.

    python bench/step_share.py examples/demo.toml --model.path runs/demo-0/sft/final --steps 2 --output runs/share

Trains as `prime-trainer rl` does with a clock around rloo_advantages, prm_loss, ppo_loss, segment_sum and their
backward passes, and prints milliseconds and shares of each step. The PPO loss inside linear_ppo_loss is not
among them.
"""

import sys
import time
from pathlib import Path

import prime_kernels as pk
from prime_kernels.ops import segment_sum
from prime_trainer import loop
from prime_trainer.config.load import load

OPERATIONS = ("rloo_advantages", "prm_loss", "ppo_loss", "segment_sum")
spent: dict[str, float] = {}


def clocked(name, function):
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

    return call


def main() -> None:
    for name in OPERATIONS:
        setattr(pk, name, clocked(name, getattr(pk, name)))
    backward = segment_sum.SegmentSum.backward
    segment_sum.SegmentSum.backward = staticmethod(clocked("backward of sums", backward))
    step = loop.Run.train_step

    def timed_step(self):
        spent.clear()
        start = time.perf_counter()
        result = step(self)
        seconds = time.perf_counter() - start
        parts = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in spent.items())
        print(f"step {self.step}: {seconds:.1f} s; {parts}; {100 * sum(spent.values()) / seconds:.4f} % in all")
        return result

    loop.Run.train_step = timed_step
    loop.run(load(Path(sys.argv[1]), sys.argv[2:]))


if __name__ == "__main__":
    main()
