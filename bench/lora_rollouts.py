"""A policy with an adapter in vLLM: merged weights pushed into the engine against LoRA requests.

usage: python bench/lora_rollouts.py measure RESULTS.json --model.path PATH [--rank 64] [--rounds 3] [--prompts 16]
                                              [--arms merged,lora] [--KEY]
       python bench/lora_rollouts.py table RESULTS.json bench/results/adapters

Each arm is a process of its own, with vLLM in it. A round is an update (`merged`: the adapter merged into each weight
as the engine takes it; `lora`: files written, and a request of a new number), the policy moved before it, and then six
responses a prompt of at most 48 tokens. `measure` adds to what RESULTS.json has. Seconds are the processor's. The
mismatch is that of the engine's log-probs and the trainer's, which adds the product of the adapter to rounded outputs.
Entries of B are +-`size`: what AdamW makes of 0 in ten steps is ten times the rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rollout import prompt

from prime_trainer.config.load import load
from prime_trainer.data.groups import Group, Response
from prime_trainer.models import loading, placement, tokenizers
from prime_trainer.models.adapters import files
from prime_trainer.models.adapters.views import AdaptedModel, as_model
from prime_trainer.report import markdown
from prime_trainer.rollout import Sampling
from prime_trainer.rollout.sampler import Sample, model_shape
from prime_trainer.rollout.vllm.engine import QUIET, Engine, engine_options, finished
from prime_trainer.run.provenance import environment
from prime_trainer.train.batch import Batch
from prime_trainer.train.importance import importance
from prime_trainer.train.prm_step import Scorer

N, TOKENS = 6, 48
ARMS, SIZES = ("merged", "lora"), (0.0, 1e-3, 1e-2)
Draw = Callable[[Sequence[list[int]], Sequence[int]], list[Sample]]


def move(view: AdaptedModel, size: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for factors in view.factors().values():
            factors.b.copy_((torch.randint(2, factors.b.shape, generator=generator) * 2 - 1) * size)


def merged(directory: str, options: dict[str, Any], view: AdaptedModel) -> tuple[Callable[[int], None], Draw]:
    loading.save_config(as_model(view), directory)
    engine, model = Engine(directory, options, view.device), as_model(view)
    shape = model_shape(model, tokenizers.load_tokenizer(view.base.cfg))

    def update(_: int) -> None:
        engine.load(shape.check_weights(loading.named_tensors(model)))

    return update, lambda prompts, seeds: engine.generate(prompts, seeds, Sampling(TOKENS), [], 0)


def lora(directory: str, options: dict[str, Any], view: AdaptedModel) -> tuple[Callable[[int], None], Draw]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    from prime_trainer.rollout.vllm.engine import register_head

    register_head()
    base, rank = view.base.cfg, view.base.configs["policy"].r
    engine = LLM(
        str(base.path), skip_tokenizer_init=True, enable_lora=True, max_lora_rank=rank, max_loras=1, max_cpu_loras=1,
        **options,
    )  # fmt: skip
    requests: list[LoRARequest] = []

    def update(version: int) -> None:
        files.write(view, Path(directory) / str(version), view.adapter_tensors(), "")
        requests[:] = [LoRARequest(f"policy-{version}", version + 1, str(Path(directory) / str(version)))]
        engine.llm_engine.add_lora(requests[0])

    def draw(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        params = [
            SamplingParams(temperature=1.0, max_tokens=TOKENS, seed=seed, logprobs=0, detokenize=False)
            for seed in seeds
        ]
        given = [{"prompt_token_ids": each} for each in prompts]
        samples = []
        for output in engine.generate(given, params, lora_request=requests[0], use_tqdm=False):
            (one,) = output.outputs
            logprobs = [entry[i].logprob for i, entry in zip(one.token_ids, one.logprobs, strict=True)]
            samples.append(finished(list(one.token_ids), logprobs, one.finish_reason, 0))
        return samples

    return update, draw


def one(arm: str, rounds: int, count: int, words: list[str]) -> list[dict[str, object]]:
    import os

    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    cfg = load(None, words)
    view = placement.put_adapter(placement.load_base(cfg.model), "policy", cfg.model, 0)
    options = engine_options(cfg.rollout, cfg.model, on_cpu=True, limit=512)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    prompts = [prompt(tokenizer, i) for i in range(count)]
    every = [each for each in prompts for _ in range(N)]
    scorer, rows = Scorer(None, None, 1024), []
    with tempfile.TemporaryDirectory() as directory:
        update, draw = (merged if arm == "merged" else lora)(directory, options, view)
        for version, size in enumerate([SIZES[0], *(size for size in SIZES for _ in range(rounds))]):
            move(view, size, version)
            began = time.perf_counter(), time.process_time()
            update(version)
            updated = time.perf_counter(), time.process_time()
            samples = draw(every, range(len(every)))
            drawn = time.perf_counter(), time.process_time()
            made = [Response(s.ids, 0.0, s.logprobs) for s in samples]
            groups = [Group(p, made[k * N : k * N + N]) for k, p in enumerate(prompts)]
            batch = Batch.for_model(as_model(view), groups)
            trainers = scorer.log_probs(as_model(view), batch, scorer.parts(batch))
            _, found = importance(trainers, batch.rollout_logp, 0.0)
            row = {"arm": arm, "responses": len(every), "size": size, "tokens": batch.num_tokens} | {
                name: float(found[name]) for name in ("mismatch", "mismatch_max", "mismatch_kl")
            }
            row |= {"update s": updated[0] - began[0], "update cpu s": updated[1] - began[1]}
            row |= {"sample s": drawn[0] - updated[0], "sample cpu s": drawn[1] - updated[1]}
            if version:  # the first warms up
                rows.append(row)
    return rows


def table(source: Path, folder: Path) -> None:
    rows = json.loads(source.read_text())["rows"]
    head = ["", "responses", "entries of B", "update, s", "tokens/s", "mean mismatch, nats", "most", "KL"]
    lines = []
    for arm, responses, size in dict.fromkeys((row["arm"], row["responses"], row["size"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["responses"], row["size"]) == (arm, responses, size)]
        rates = [row["tokens"] / row["sample cpu s"] for row in mine]
        middle = {name: statistics.median(row[name] for row in mine) for name in mine[0] if name != "arm"}
        lines.append([
            arm, responses, f"{size:g}", f"{middle['update cpu s']:.2f}", f"{statistics.median(rates):.0f}",
            f"{middle['mismatch']:.4f}", f"{max(row['mismatch_max'] for row in mine):.2f}",
            f"{middle['mismatch_kl']:.1e}",
        ])  # fmt: skip
    text = markdown.grid(head, lines, numbers=True)
    (folder / "lora_rollouts.md").write_text(text)
    print(text)


def main() -> None:
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["measure", "table"])
    parser.add_argument("results", type=Path)
    parser.add_argument("where", type=Path, nargs="?")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--arms", default=",".join(ARMS))
    args, words = parser.parse_known_args()
    if args.command == "table":
        table(args.results, args.where)
        return
    own = [
        *words,
        "--model.adapter.rank",
        str(args.rank),
        "--model.device",
        "cpu",
        "--output",
        str(args.results.parent),
    ]
    found: dict[str, Any] = {"environment": environment(), "rows": []}
    if args.results.exists():
        found = json.loads(args.results.read_text())
    for arm in args.arms.split(","):
        asked = [sys.executable, __file__, "one", arm, str(args.rounds), str(args.prompts), *own]
        said = subprocess.run(asked, stdout=subprocess.PIPE, check=True, text=True).stdout
        found["rows"] += json.loads(said.splitlines()[-1])
        print(*found["rows"][-len(SIZES) * args.rounds :], sep="\n", flush=True)
        args.results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
