"""One training step of ours beside one of TRL's GRPO trainer: seconds, peak memory, loss and gradient norm.

usage: python bench/step.py TARGET_DIRECTORY [--tokens 64] [--groups 16] [--n 6] [--prompt 128] [--dtype bfloat16]
           [--ways trl,openrlhf,outcomes,recomputed,freeze,policy] [--model DIRECTORY] [--note TEXT]

`make bench-step` runs it where TRL is installed. Prompts and completions are given, of random tokens and equal lengths,
so that sampling costs nothing and nothing is padded; both sides take one optimizer step on all of them with passes of n
sequences, or as many tokens. Seconds are the process's own, by the CPU's clock where it has one thread: on a machine
that others use the wall's say nothing.

TRL's loss is `dapo` on unscaled rewards times n / (n - 1): then its advantages and its loss are those of RLOO with the
mean over tokens, and loss and gradient norm can be compared. A way is a process of its own; a call adds its rows to
TARGET_DIRECTORY/results.json and renews the table. Of OpenRLHF its actor and loss are run (bench/step_openrlhf.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from step_openrlhf import by_openrlhf
from table import measured_on

from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.loading import SMOLLM2, load_model, save
from prime_trainer.models.tokenizers import load_tokenizer
from prime_trainer.run.provenance import environment

WAYS = {
    "trl": "TRL, GRPO",
    "openrlhf": "OpenRLHF, its actor and loss",
    "outcomes": "ours, outcomes alone",
    "recomputed": "ours, outcomes alone, full recomputation",
    "freeze": 'ours, PRIME, `ref_type = "freeze"`',
    "policy": 'ours, PRIME, `ref_type = "policy"`',
}
COLUMNS = (
    "groups x responses x (prompt + tokens)", "dtype", "way", "s", "response tokens/s", "speed, TRL = 1", "peak MiB",
    "memory, TRL = 1", "loss", "gradient norm",
)  # fmt: skip
SAME = ("tokens", "groups", "n", "prompt", "dtype", "threads")
"""Settings that rows must share to be compared."""


def made(groups: int, n: int, prompt: int, tokens: int, vocabulary: int) -> list[Group]:
    """Groups of random tokens, a third of the responses of each right."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(100, vocabulary, (length,), generator=generator).tolist()

    return [
        Group(ids(prompt), [Response(ids(tokens), float(k % 3 == 0), [-1.0] * tokens) for k in range(n)])
        for _ in range(groups)
    ]


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def clock() -> float:
    """Seconds of this process on a CPU, or of the wall where several threads work for it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def by_trl(model: Path, groups: list[Group], dtype: str) -> dict[str, float]:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    n = len(groups[0].responses)
    at = iter([(group, response) for group in groups for response in group.responses])

    def given(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        pairs = [next(at) for _ in prompts]
        return {
            "prompt_ids": [group.prompt_ids for group, _ in pairs],
            "completion_ids": [response.ids for _, response in pairs],
            "logprobs": None,
            "outcome": [response.outcome for _, response in pairs],
        }

    def reward(outcome: list[float], **_: Any) -> list[float]:
        return [value * n / (n - 1) for value in outcome]

    begin: list[float] = []

    class Timed(GRPOTrainer):
        def training_step(self, *arguments: Any, **options: Any) -> Any:
            if not begin:
                held.append(megabytes())
                begin.append(clock())
            return super().training_step(*arguments, **options)

        def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
            if "loss" in logs:
                ended.append(clock())
            super().log(logs, *arguments, **options)

    held: list[float] = []
    ended: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=1, per_device_train_batch_size=n,
            gradient_accumulation_steps=len(groups), num_generations=n, beta=0.0,
            loss_type="dapo", scale_rewards="none", max_completion_length=len(groups[0].responses[0].ids),
            learning_rate=1e-6, max_grad_norm=1.0, lr_scheduler_type="constant", logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=True, bf16=dtype == "bfloat16", seed=0, disable_tqdm=True, shuffle_dataset=False,
            gradient_checkpointing=False,
        )  # fmt: skip
        trainer = Timed(
            # With bf16 it computes in autocast over float32 weights, as its users do.
            model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
            reward_funcs=reward, args=config, rollout_func=given,
            train_dataset=Dataset.from_dict({"prompt": [str(k) for k in range(len(groups))]}),
        )  # fmt: skip
        trainer.train()
    (log,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": ended[0] - begin[0], "before_MiB": held[0], "loss": log["loss"], "grad_norm": log["grad_norm"],
    }  # fmt: skip


def by_us(model: Path, groups: list[Group], dtype: str, way: str) -> dict[str, float]:
    from prime_trainer import loop
    from prime_trainer.config.run_config import RunConfig

    n, length = len(groups[0].responses), len(groups[0].prompt_ids) + len(groups[0].responses[0].ids)
    alone = way in ("outcomes", "recomputed")
    with tempfile.TemporaryDirectory() as folder:
        sections: dict[str, Any] = {
            "output": folder, "steps": 1, "micro_batch_tokens": n * length,
            "model": {"path": str(model), "dtype": dtype, "device": "cpu"},
            "task": {"name": "chain_sum", "eval_size": 1},
            "rollout": {"engine": "transformers", "n": n, "prompts_per_step": len(groups), "tis": "off"},
            "algorithm": {"process_coef": 0.0 if alone else 1.0, "whiten": not alone},
            "prm": {"ref_type": "freeze" if alone else way},
            "scale": {"activation_checkpointing": "full" if way == "recomputed" else "selective"},
            "policy": {"lr": 1e-6, "minibatches": 1, "grad_clip": 1.0},
            "metrics": {"trackers": []},
        }  # fmt: skip
        cfg = RunConfig(**sections)
        run = loop.Run(cfg)
        run.rollouts.batch = lambda step, clock: (groups, {})
        before, begin = megabytes(), clock()
        found = run.train_step().metrics
        seconds = clock() - begin
        run.close()
    stages = {key: value for key, value in found.items() if key.startswith("time/")}
    return {
        "seconds": seconds, "before_MiB": before, "loss": found["policy_loss"], "grad_norm": found["policy_grad_norm"],
        **stages,
    }  # fmt: skip


def child(way: str, model: Path, result: Path, sizes: dict[str, int], dtype: str) -> None:
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    groups = made(**sizes, vocabulary=vocabulary)
    if way == "openrlhf":
        found = by_openrlhf(model, groups, dtype, clock)
    else:
        found = by_trl(model, groups, dtype) if way == "trl" else by_us(model, groups, dtype, way)
    found |= {"peak_MiB": megabytes()}
    row = {"way": way, "dtype": dtype, "threads": torch.get_num_threads(), **sizes, **found}
    result.write_text(json.dumps(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", type=Path)
    for name, value in (("tokens", 64), ("groups", 16), ("n", 6), ("prompt", 128)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--ways", default=",".join(WAYS), help=f"of {', '.join(WAYS)}")
    parser.add_argument("--model", type=Path, help="a directory in place of SmolLM2-135M-Instruct")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--child", choices=list(WAYS), help=argparse.SUPPRESS)
    at = parser.parse_args()
    sizes = {name: getattr(at, name) for name in ("tokens", "groups", "n", "prompt")}
    if at.child is not None:
        child(at.child, at.model, at.target, sizes, at.dtype)
        return
    wanted = at.ways.split(",")
    if not set(wanted) <= set(WAYS):
        parser.error(f"--ways: expected some of {', '.join(WAYS)}, got {at.ways}")
    at.target.mkdir(parents=True, exist_ok=True)
    kept = at.target / "results.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text())["rows"] if kept.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        model = at.model
        if model is None:
            model = Path(folder) / "model"
            config = ModelConfig(path=SMOLLM2, dtype="float32", device="cpu")
            save(load_model(config), load_tokenizer(config), model)
        for way in wanted:
            result = Path(folder) / "row.json"
            words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
            command = [sys.executable, __file__, str(result), "--child", way, "--model", str(model), *words]
            subprocess.run([*command, "--dtype", at.dtype], check=True)
            row = json.loads(result.read_text()) | {"note": at.note}
            same = ("way", *SAME)
            rows = [other for other in rows if any(other[key] != row[key] for key in same)] + [row]
            kept.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
            (at.target / "README.md").write_text(readme(rows))


def readme(rows: list[dict[str, Any]]) -> str:
    lines = []
    for key in sorted({tuple(row[name] for name in SAME) for row in rows}):
        members = [row for row in rows if tuple(row[name] for name in SAME) == key]
        members.sort(key=lambda row: list(WAYS).index(row["way"]))
        peer = next((row for row in members if row["way"] == "trl"), None)
        for row in members:
            tokens = row["groups"] * row["n"] * row["tokens"]
            faster = "" if peer is None else f"{peer['seconds'] / row['seconds']:.2f}"
            memory = "" if peer is None else f"{row['peak_MiB'] / peer['peak_MiB']:.2f}"
            lines.append([
                f"{row['groups']} x {row['n']} x ({row['prompt']} + {row['tokens']})", row["dtype"], WAYS[row["way"]],
                f"{row['seconds']:.1f}", f"{tokens / row['seconds']:.0f}", faster, f"{row['peak_MiB']:,.0f}", memory,
                f"{row['loss']:.6f}", f"{row['grad_norm']:.5f}",
            ])  # fmt: skip
    table = "\n".join("| " + " | ".join(line) + " |" for line in [COLUMNS, ["---"] * len(COLUMNS), *lines])
    first = rows[0]
    notes = sorted({row["note"] for row in rows if row["note"]})
    return f"""# One training step beside TRL's

SmolLM2-135M-Instruct, prompts and completions of random tokens, given; one optimizer step on all of them, passes of
{first["n"]} sequences. `python bench/step.py`; each way is a process of its own, and peak is the
most that process held, its imports, weights and optimizers included. Seconds of one thread are its own on the CPU.

{table}

TRL's bfloat16 is autocast over float32 weights; ours are bfloat16 weights with float32 masters. PRIME's loss is of
other advantages and compares with nothing; its rows hold two more models (`freeze`) or one (`policy`).

{measured_on()} {first["threads"]} thread(s). {" ".join(notes)}
"""


if __name__ == "__main__":
    main()
