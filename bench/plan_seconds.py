"""Seconds of a step that `plan --calibrate` predicts beside those that steps of the same run take.

    python bench/plan_seconds.py examples/demo.toml [--steps 1] [--model.path DIR] ... > seconds.md

Takes one step that does not count and `--steps` that do, probes at their mean lengths, and takes as many again. With
one thread all seconds are of this process on the CPU: of the wall's, a machine that others use takes more. Groups are
not filtered: sampling is one round.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import torch

from prime_trainer import calibrate, loop
from prime_trainer.config.load import load
from prime_trainer.plan import seconds

UNFILTERED = ["--filter.low", "0", "--filter.high", "1"]


def main() -> None:
    words = sys.argv[1:]
    steps = 1
    if "--steps" in words:
        at = words.index("--steps")
        steps = int(words[at + 1])
        del words[at : at + 2]
    cfg = load(Path(words.pop(0)), [*words, *UNFILTERED])
    kept = time.perf_counter
    if torch.get_num_threads() == 1:
        time.perf_counter = time.process_time
    try:
        print(compared(cfg, steps))
    finally:
        time.perf_counter = kept


def compared(cfg, steps: int) -> str:
    run = loop.Run(cfg)
    try:
        results = [run.train_step() for _ in range(1 + steps)][1:]
        prompt, response, _ = lengths(results)
        begin = time.perf_counter()
        rates = calibrate.probe(cfg, prompt, response)
        probed = time.perf_counter() - begin
        results += [run.train_step() for _ in range(steps)]
    finally:
        run.close()
    prompt, response, groups = lengths(results)
    measured = {
        stage: statistics.mean(result.metrics.get(f"time/{stage}", 0.0) for result in results)
        for stage in ("rollout", "score", "prm", "policy")
    }
    # The clock of a step has scoring and the PRM's update as one stage where there are both.
    measured["score and prm"] = measured.pop("score") + measured.pop("prm")
    found = seconds.predict(rates, cfg.needs, cfg.policy, cfg.prm, cfg.rollout, response)
    found["score and prm"] = found.pop("score", 0.0) + found.pop("prm", 0.0)
    lines = [
        f"{cfg.model.path}, {cfg.model.dtype}, {torch.get_num_threads()} thread(s): {groups} groups of "
        f"{cfg.rollout.n}, prompts of {prompt} and responses of {response} tokens in the mean; "
        f"probes of {probed:.0f} s, {len(results)} steps",
        "", "| stage | predicted s | measured s | predicted / measured |", "|---|--:|--:|--:|",
    ]  # fmt: skip
    whole = (sum(found.values()), sum(measured.values()))
    rows = [(stage, found.get(stage, 0.0), taken) for stage, taken in measured.items() if taken]
    for stage, one, other in [*rows, ("**sum**", *whole)]:
        lines.append(f"| {stage} | {one:.3f} | {other:.3f} | {one / other:.2f} |")
    return "\n".join(lines)


def lengths(results) -> tuple[int, int, int]:
    """Mean tokens of prompts and of responses, and the groups of a step."""
    groups = [group for result in results for group in result.batch.groups]
    prompt = round(statistics.mean(len(group.prompt_ids) for group in groups))
    response = round(statistics.mean(len(r.ids) for group in groups for r in group.responses))
    return prompt, response, len(groups) // len(results)


if __name__ == "__main__":
    main()
