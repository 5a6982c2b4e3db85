"""Accuracy on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .config import RunConfig
from .models import load_tokenizer, render
from .rollout import Sampler, Sampling, derive_seed
from .tasks import Problem, load_task
from .verify import Verifier, last_boxed


def evaluate(
    problems: Sequence[Problem],
    tokenizer: Any,
    sampler: Sampler,
    verifier: Verifier,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    sampled: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """`greedy` accuracy, `sampled` accuracy over `sampled` responses a problem, mean length, share with a box."""
    prompts = [render(tokenizer, p.messages) for p in problems]
    values: dict[str, float] = {"n": len(problems)}
    for name, n, heat in (("greedy", 1, 0.0), ("sampled", sampled, temperature)):
        if n == 0:
            continue
        seeds = [derive_seed(seed, "eval", i) for i in range(len(prompts))]
        samples = [s for group in sampler.generate(prompts, n, Sampling(max_new_tokens, heat), seeds) for s in group]
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples]
        answers = [p.answer for p in problems for _ in range(n)]
        verdicts = verifier.score(list(zip(answers, texts, strict=True)))
        values[name] = sum(v.score for v in verdicts) / len(verdicts)
        if name == "greedy":
            values["format"] = sum(last_boxed(t) is not None for t in texts) / len(texts)
            values["response_length"] = sum(len(s.ids) for s in samples) / len(samples)
    return values


def run(cfg: RunConfig) -> dict[str, float]:
    """Evaluates the model of `cfg` on the task's held-out problems."""
    from .generate import open_sampler

    tokenizer = load_tokenizer(cfg.model)
    problems = load_task(cfg.task, cfg.seed).held_out()
    sampler = open_sampler(cfg, tokenizer)
    try:
        with Verifier.from_config(cfg.task) as verifier:
            return evaluate(
                problems, tokenizer, sampler, verifier,
                max_new_tokens=cfg.rollout.max_new_tokens, temperature=cfg.rollout.temperature,
                sampled=cfg.eval.sampled, seed=cfg.seed,
            )  # fmt: skip
    finally:
        sampler.close()
