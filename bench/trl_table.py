"""TRL's GRPO trainer on SmolLM2-135M, with and without the patch: runs bench/trl_steps.py and writes the table.

usage: python bench/trl_table.py TARGET_DIRECTORY [--steps 5] [--rounds 2] [--tokens 64]

`make bench-integrations` runs it where TRL is installed. The two ways alternate, each run in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from table import measured_on

from prime_trainer.config.sections import ModelConfig
from prime_trainer.models.loading import SMOLLM2, load_model, save
from prime_trainer.models.tokenizers import load_tokenizer
from prime_trainer.run.provenance import environment

KEYS = ("loss", "grad_norm", "entropy", "kl")


def main(target: Path, steps: int, rounds: int, tokens: int) -> None:
    runs: dict[bool, list[dict]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        model, result = Path(folder) / "model", Path(folder) / "result.json"
        config = ModelConfig(path=SMOLLM2, dtype="float32", device="cpu")
        save(load_model(config), load_tokenizer(config), model)
        command = [sys.executable, str(Path(__file__).with_name("trl_steps.py")), model, result]
        for _ in range(rounds):
            for patched, found in runs.items():
                options = ["--steps", str(steps), "--tokens", str(tokens), *(["--patch"] if patched else [])]
                subprocess.run([*map(str, command), *options], check=True)
                found.append(json.loads(result.read_text()))
        subprocess.run([*map(str, command), "--part"], check=True)
        part = json.loads(result.read_text())
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text(readme(runs, part, steps, tokens))
    numbers = {"environment": environment(), "runs": [run for found in runs.values() for run in found], "part": part}
    (target / "results.json").write_text(json.dumps(numbers) + "\n")


def readme(runs: dict[bool, list[dict]], part: dict, steps: int, longest: int) -> str:
    def line(name: str, unit: str, old: float, new: float) -> str:
        digits = 0 if unit == "MiB" else 2
        return f"| {name} | {old:.{digits}f} {unit} | {new:.{digits}f} {unit} | {old / new:.2f} |"

    def alone(key: str) -> list[float]:
        return [statistics.median(part[way][key]) for way in ("TRL", "patched")]

    def in_runs(value: Callable[[dict], float]) -> list[float]:
        return [statistics.median(map(value, runs[way])) for way in (False, True)]

    rows = [
        line("log-prob part alone, forward", "s", *alone("forward")),
        line("log-prob part alone, backward", "s", *alone("backward")),
        line("log-prob part alone, peak", "MiB", part["TRL"]["peak_MiB"], part["patched"]["peak_MiB"]),
        line("peak of the trainer's process", "MiB", *in_runs(lambda run: run["peak_MiB"])),
    ]
    table = "\n".join(["| | TRL | patched | TRL / patched |", "|---|---|---|---|", *rows])
    logs = [runs[way][0]["logs"] for way in (False, True)]
    losses = "\n".join(
        f"| {step} | " + " | ".join(f"{value[key]:.6f}" for key in ("loss", "entropy") for value in pair) + " |"
        for step, pair in enumerate(zip(*logs, strict=True), 1)
    )
    largest = {key: max(abs(one[key] - two[key]) for one, two in zip(*logs, strict=True)) for key in KEYS}
    differences = ", ".join(f"{key} {value:.1e}" for key, value in largest.items())
    tokens = statistics.median(runs[True][0]["tokens"])
    return f"""# TRL's GRPO trainer with and without `prime_kernels.integrations.trl.patch()`

SmolLM2-135M-Instruct in float32, {steps} steps of TRL {version("trl")}: 8 completions of up to {longest} tokens, two
updates on each batch, a KL penalty to a reference model. Runs of each way: {len(runs[True])}, in turn; a call in them
scores {tokens:.0f} tokens against 49,152 words, entropy included.

{table}

Largest differences in what the trainer logged: {differences}.

| step | loss, TRL | loss, patched | entropy, TRL | entropy, patched |
|---|---|---|---|---|
{losses}

{measured_on()}

The part alone: {part["tokens"]:,} tokens on the model's head with the gradients of both, {part["threads"]} thread(s),
medians of {len(part["TRL"]["forward"])} calls each way in turn, peak beyond inputs. On GPUs TRL scores completions
alone and has Triton kernels of its own: nothing here speaks of them.
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    main(**vars(parser.parse_args()))
