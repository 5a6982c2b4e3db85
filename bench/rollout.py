"""Tokens a second of the rollout engines and of plain `model.generate`, alternating in one run; and steps of runs.

usage: python bench/rollout.py measure RESULTS.json [--model PATH] [--rounds N] [--batches 64,256] [--engines vllm,..]
              [--n 4] [--tokens 48]
       python bench/rollout.py table RESULTS.json bench/results/rollout [RUN_DIR ...]

`table` adds the mean stages of finished `prime-trainer rl` runs, one row each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import closing
from pathlib import Path

import torch

from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading, tokenizers
from prime_trainer.report.run_record import read_record
from prime_trainer.rollout import EngineConfig, Sampling, make_sampler
from prime_trainer.run.provenance import environment
from prime_trainer.run.seeds import derive_seed

ENGINES = ("transformers", "vllm", "vllm-server")
STAGES = ("rollout", "weights", "prm", "policy", "total")


def measure(target: Path, path: str, rounds: int, batches: list[int], engines: list[str], n: int, tokens: int) -> None:
    model_cfg = ModelConfig(path=path, chat_template="bare", device="cpu")
    model, tokenizer = loading.load_model(model_cfg), tokenizers.load_tokenizer(model_cfg)
    configs = {
        engine: RunConfig(
            output=target.parent / "rollout-bench",
            model=model_cfg,
            rollout={"engine": engine, "max_new_tokens": tokens, "batch_size": max(batches)},
        )
        for engine in engines
    }
    results, samplers = [], {}
    for engine, cfg in configs.items():
        begin = time.perf_counter()
        samplers[engine] = make_sampler(EngineConfig(cfg.rollout, model_cfg, cfg.output), model, tokenizer)
        loaded = time.perf_counter()
        samplers[engine].update_weights(loading.named_tensors(model), 1)
        results.append(
            {"engine": engine, "load seconds": loaded - begin, "update seconds": time.perf_counter() - loaded}
        )
        print(results[-1], flush=True)
    try:
        for batch in batches:
            prompts = [prompt(tokenizer, i) for i in range(batch // n)]
            seeds = [derive_seed("bench", i) for i in range(len(prompts))]
            ways = {"generate": lambda p, _: generate(model, tokenizer, p, n, tokens)} | {
                name: lambda p, s, sampler=sampler: sampled(sampler, p, s, n, tokens)
                for name, sampler in samplers.items()
            }
            for way in ways.values():
                way(prompts[:4], seeds[:4])
            for round_ in range(rounds):
                for name, way in ways.items():
                    begin = time.perf_counter()
                    count = way(prompts, seeds)
                    seconds = time.perf_counter() - begin
                    results.append(
                        {"engine": name, "batch": batch, "round": round_, "tokens": count, "seconds": seconds}
                    )
                    print(results[-1], flush=True)
                    record = {"environment": environment() | {"model": Path(path).name}, "results": results}
                    record |= {"n": n, "max tokens": tokens}
                    target.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        for sampler in samplers.values():
            with closing(sampler):
                pass


def prompt(tokenizer, i: int) -> list[int]:
    """Questions of 10 to 60 tokens."""
    numbers = " + ".join(str((7 * i + k) % 10) for k in range(3 + i % 5))
    context = "Show your work. " * (i % 4)
    return tokenizers.render(
        tokenizer, [{"role": "user", "content": f"{context}What is {numbers}? Explain the answer."}]
    )


def sampled(sampler, prompts, seeds, n: int, tokens: int) -> int:
    samples = sampler.generate(prompts, n, Sampling(tokens), seeds)
    return sum(len(s.ids) for group in samples for s in group)


@torch.no_grad()
def generate(model, tokenizer, prompts, n: int, tokens: int) -> int:
    """As trainers call it: left-padded, each prompt repeated for its responses, all rows until the last one ends."""
    rows = [p for p in prompts for _ in range(n)]
    width = max(map(len, rows))
    stops = tokenizers.stop_ids(model, tokenizer)
    ids = torch.tensor([[stops[0]] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
        max_new_tokens=tokens, eos_token_id=stops, pad_token_id=stops[0],
    )[:, width:]  # fmt: skip
    ended = torch.isin(out, torch.tensor(stops)).int().cumsum(1)
    return int((ended - torch.isin(out, torch.tensor(stops)).int() == 0).sum())


def table(source: Path, target: Path, runs: list[Path]) -> None:
    record = json.loads(source.read_text())
    rounds = [r for r in record["results"] if "round" in r]
    starts = {r["engine"]: r for r in record["results"] if "load seconds" in r}
    batches = sorted({r["batch"] for r in rounds})
    rates = {
        (name, batch): [r["tokens"] / r["seconds"] for r in rounds if (r["engine"], r["batch"]) == (name, batch)]
        for name in ("generate", *ENGINES)
        for batch in batches
    }
    head = ["engine", *(f"batch {b}, tokens/s" for b in batches), *(f"batch {b}, to generate" for b in batches)]
    lines = [[*head, "load, s", "update, s"], ["---"] * (len(head) + 2)]
    for name in ("generate", *ENGINES):
        start = starts.get(name)
        lines.append(
            [
                name,
                *(f"{statistics.median(rates[name, b]):.0f}" if rates[name, b] else "" for b in batches),
                *(f"{ratio(rates[name, b], rates['generate', b]):.2f}x" if rates[name, b] else "" for b in batches),
                *(f"{start[key]:.2f}" if start else "" for key in ("load seconds", "update seconds")),
            ]
        )
    text = markdown(lines)
    if runs:
        steps = [["run", "engine", "steps", *(f"{stage}, s" for stage in STAGES)], ["---"] * (len(STAGES) + 3)]
        record["steps"] = []
        for run in runs:
            rows = [row for _, row in sorted(read_record(run).metrics["rl"].items())]
            engine = json.loads((run / "config.json").read_text())["rollout"]["engine"]
            means = {s: statistics.mean(row.get(f"time/{s}", 0.0) for row in rows) for s in STAGES}
            steps.append([run.name, engine, str(len(rows)), *(f"{means[s]:.1f}" for s in STAGES)])
            record["steps"].append({"run": run.name, "engine": engine, "rows": rows})
        text += "\n\nMean seconds of a step of the demo:\n\n" + markdown(steps)
    made = record["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    counts = " and ".join(f"{len(rates['generate', b])} at batch {b}" for b in batches)
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text(
        f"# Rollout engines\n\n{text}\n\nOne run, all ways in turn each round, medians of {counts}; a ratio is the "
        f"median of the rounds' own. A batch is that many responses of at most "
        f"{record.get('max tokens', 48)} tokens, {record.get('n', 4)} to a prompt; "
        f"tokens after a response's end do not count. `generate` is transformers' own with left padding.\n\n"
        f"Measured with {made['cores']} cores of {made['processor']} ({', '.join(made['vector_sets'])}), Python "
        f"{made['python']}, {packages}, commit {made['commit']}.\n"
    )
    (target / "results.json").write_text(json.dumps(record, indent=1) + "\n")


def ratio(rates: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(rates, base, strict=False))


def markdown(lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("target", type=Path)
    one.add_argument("--model", default=loading.SMOLLM2)
    one.add_argument("--rounds", type=int, default=3)
    one.add_argument("--batches", default="64,256")
    one.add_argument("--n", type=int, default=4, help="responses to a prompt")
    one.add_argument("--tokens", type=int, default=48, help="of a response at most")
    one.add_argument("--engines", default=",".join(ENGINES), help="those beside `generate`; vLLM's need vLLM")
    two = commands.add_parser("table")
    two.add_argument("source", type=Path)
    two.add_argument("target", type=Path)
    two.add_argument("runs", type=Path, nargs="*")
    words = parser.parse_args()
    if words.command == "measure":
        batches = [int(b) for b in words.batches.split(",")]
        measure(words.target, words.model, words.rounds, batches, words.engines.split(","), words.n, words.tokens)
    else:
        table(words.source, words.target, words.runs)
