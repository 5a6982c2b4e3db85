"""Samples responses to a task's problems and marks them: one row a problem, in the form `prime-trainer prm` reads.

    python bench/prm/sample.py examples/prm.toml --model.path MODEL --output RUN

writes RUN/train.jsonl (`TRAIN` problems of the training stream, past those of the warm-up) and RUN/test.jsonl (the
task's held-out problems). Run again after an interruption, it goes on with the problem that is missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.data.problems import Problem
from prime_trainer.data.tasks import load_task
from prime_trainer.models import loading, tokenizers
from prime_trainer.rollout import Sampling, TransformersSampler
from prime_trainer.run.progress import progress_bar
from prime_trainer.run.seeds import derive_seed
from prime_trainer.verify import Verifier

TRAIN = 300
FIRST = 4096
"""Position in the training stream: the warm-up's demonstrations come before it."""
CHUNK = 12
"""Problems between two writes."""


def problems(cfg: RunConfig) -> dict[str, list[Problem]]:
    """`train` and `test`, without a question that occurs twice."""
    task = load_task(cfg.task, cfg.seed)
    distinct: dict[str, Problem] = {}
    for problem in task.train(FIRST, 2 * TRAIN):
        distinct.setdefault(problem.messages[-1]["content"], problem)
    return {"train": list(distinct.values())[:TRAIN], "test": task.held_out()}


def sample(cfg: RunConfig, sampler: Any, tokenizer: Any, verifier: Verifier, chunk: list[Problem]) -> list[dict]:
    prompts = [tokenizers.render(tokenizer, p.messages) for p in chunk]
    sampling = Sampling(cfg.rollout.max_new_tokens, cfg.rollout.temperature)
    seeds = [derive_seed(cfg.seed, "prm", p.id) for p in chunk]
    rows = []
    for problem, samples in zip(chunk, sampler.generate(prompts, cfg.rollout.n, sampling, seeds), strict=True):
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples]
        verdicts = verifier.score([(problem.answer, text) for text in texts])
        rows.append(
            {
                "id": problem.id,
                "benchmark": f"sums, seed {cfg.seed}",
                "prompt": problem.messages,
                "reference": problem.reference,
                "completions": texts,
                "correctness": [verdict.score for verdict in verdicts],
                "finished": [s.finish_reason == "stop" for s in samples],
            }
        )
    return rows


def main(words: list[str]) -> None:
    cfg = load(Path(words[0]), words[1:])
    cfg.output.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    sampler = TransformersSampler(loading.load_model(cfg.model), tokenizer, batch_size=cfg.rollout.batch_size)
    with Verifier(cfg.task.verify_seconds, cfg.task.verify_workers) as verifier:
        for name, wanted in problems(cfg).items():
            path = cfg.output / f"{name}.jsonl"
            done = path.read_text().count("\n") if path.exists() else 0
            with progress_bar(f"sample {name}", len(wanted), done) as bar, path.open("a") as file:
                for at in range(done, len(wanted), CHUNK):
                    chunk = wanted[at : at + CHUNK]
                    rows = sample(cfg, sampler, tokenizer, verifier, chunk)
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
                    file.flush()
                    for row in rows:
                        bar.advance(f"right {sum(row['correctness']) / len(row['correctness']):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
