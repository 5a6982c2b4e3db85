"""Responses of a model to the benchmarks, as JSONL that a further call goes on with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config.run_config import RunConfig
from ..config.sections import AdapterConfig, BenchmarkName
from ..data.problems import Problem, prompt_ids
from ..models import loading, tokenizers
from ..models.placement import load_used
from ..models.protocols import Tokenizer
from ..rollout import EngineConfig, Sampler, Sampling, make_sampler
from ..run import unchanged
from ..run.atomic_files import replace_file
from ..run.jsonl import JsonlWriter, read_jsonl, read_object
from ..run.output_lock import owns_output
from ..run.progress import progress_bar
from ..run.seeds import derive_seed
from . import benchmarks

GREEDY, SAMPLED = "greedy", "sampled"
FILES = "the files of model.path"


def open_sampler(cfg: RunConfig, tokenizer: Tokenizer) -> Sampler:
    """The model of `cfg.model`, to be sampled from."""
    return make_sampler(
        EngineConfig(cfg.rollout, cfg.model, cfg.output), load_used(cfg.model), tokenizer,
        batch_size=cfg.eval.batch_size,
    )  # fmt: skip


def folder(cfg: RunConfig) -> Path:
    return cfg.output / "bench"


@owns_output
def run(cfg: RunConfig) -> Path:
    """`generate` for a process that does nothing else in the folder."""
    return generate(cfg)


def generate(cfg: RunConfig) -> Path:
    """Writes `bench/NAME.jsonl` below `cfg.output`, a line a response, and returns the folder.

    What is there already is kept and only the rest is generated; raises ValueError if it was generated in another way.
    """
    target = folder(cfg)
    # Every file is read before a model is loaded: what is wrong with one shows at once.
    problems = {name: benchmarks.load(name, cfg.bench) for name in benchmarks.wanted(cfg.bench)}
    _claim(cfg, target)
    work = [
        (name, mode, n, left)
        for name in problems
        for mode, n in ((GREEDY, int(cfg.bench.greedy)), (SAMPLED, cfg.bench.samples))
        if n and (left := _missing(target / f"{name}.jsonl", problems[name], mode, n))
    ]
    if not work:
        return target
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    sampler = open_sampler(cfg, tokenizer)
    total = sum(len(left) for *_, left in work)
    try:
        with progress_bar("generate", total) as bar:
            for name, mode, n, left in work:
                with JsonlWriter(target / f"{name}.jsonl") as file:
                    for chunk in _chunks(left, max(1, cfg.eval.batch_size // n)):
                        file.append(_respond(cfg, name, mode, n, chunk, sampler, tokenizer))
                        for _ in chunk:
                            bar.advance(f"{name} {mode}")
    finally:
        sampler.close()
    return target


def read(cfg: RunConfig, name: BenchmarkName) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The responses to a benchmark by (id, mode, index)."""
    return {(row["id"], row["mode"], row["index"]): row for row in read_jsonl(folder(cfg) / f"{name}.jsonl")}


def _respond(
    cfg: RunConfig,
    name: BenchmarkName,
    mode: str,
    n: int,
    chunk: Sequence[Problem],
    sampler: Sampler,
    tokenizer: Tokenizer,
) -> list[dict[str, Any]]:
    prompts = [prompt_ids(tokenizer, p) for p in chunk]
    sampling = Sampling(cfg.bench.max_new_tokens, 0.0 if mode == GREEDY else cfg.bench.temperature)
    seeds = [derive_seed(cfg.seed, "bench", name, p.id) for p in chunk]
    rows = []
    for problem, samples in zip(chunk, sampler.generate(prompts, n, sampling, seeds), strict=True):
        for index, sample in enumerate(samples):
            text = tokenizer.decode(sample.ids, skip_special_tokens=True)
            rows.append({
                "id": problem.id, "mode": mode, "index": index, "messages": problem.messages, "response": text,
                "tokens": len(sample.ids), "finish_reason": sample.finish_reason,
            })  # fmt: skip
    return rows


def _claim(cfg: RunConfig, target: Path) -> None:
    """Notes how responses are made; another way of making them must not be mixed in."""
    bench = cfg.bench
    made = {
        "seed": cfg.seed,
        **{f"model.{key}": value for key, value in cfg.model.model_dump(mode="json", exclude={"device"}).items()},
        FILES: loading.fingerprint(cfg.model),
        **{f"bench.{key}": getattr(bench, key) for key in ("temperature", "max_new_tokens", "system_prompt")},
    }
    path = target / "settings.json"
    if path.is_file():
        before = read_object(path)
        if FILES not in before:  # responses of a version that did not keep it
            before[FILES] = made[FILES]
        before.setdefault("model.adapter", AdapterConfig().model_dump(mode="json"))  # of one without adapters
        changed = [f"{key} was {before.get(key)!r}, is {made[key]!r}" for key in unchanged.differing(before, made)]
        if changed:
            raise ValueError(f"{target} holds responses made in another way ({'; '.join(changed)}): set another output")
    target.mkdir(parents=True, exist_ok=True)
    replace_file(path, json.dumps(made, indent=1) + "\n")


def _missing(path: Path, problems: Sequence[Problem], mode: str, n: int) -> list[Problem]:
    """The problems that have fewer than n responses."""
    done = {(row["id"], row["index"]) for row in read_jsonl(path) if row["mode"] == mode}
    return [p for p in problems if any((p.id, index) not in done for index in range(n))]


def _chunks(items: Sequence[Problem], size: int) -> list[Sequence[Problem]]:
    return [items[at : at + size] for at in range(0, len(items), size)]
