"""Accuracy on held-out problems, greedy and sampled."""

from __future__ import annotations

from collections.abc import Sequence

from ..config.run_config import RunConfig
from ..data.problems import Problem, prompt_ids, usable
from ..data.tasks import load_task
from ..models.protocols import Tokenizer
from ..models.tokenizers import load_tokenizer
from ..rollout import Sampler, Sampling
from ..run.seeds import derive_seed
from ..scale.ranks import SINGLE, Ranks
from ..verify import Verifier, last_boxed


def evaluate(
    problems: Sequence[Problem],
    tokenizer: Tokenizer,
    sampler: Sampler,
    verifier: Verifier,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    sampled: int = 0,
    seed: int = 0,
    ranks: Ranks = SINGLE,
) -> dict[str, float]:
    """`greedy` accuracy, `sampled` accuracy over `sampled` responses a problem, mean length, share with a box.

    Each rank takes its share of the problems; all return the same values.
    """
    indices = ranks.share(range(len(problems)))
    total, problems = len(problems), ranks.share(problems)
    prompts = [prompt_ids(tokenizer, p) for p in problems]
    values: dict[str, float] = {"n": total}
    for name, n, heat in (("greedy", 1, 0.0), ("sampled", sampled, temperature)):
        if n == 0:
            continue
        seeds = [derive_seed(seed, "eval", i) for i in indices]
        samples = [s for group in sampler.generate(prompts, n, Sampling(max_new_tokens, heat), seeds) for s in group]
        texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples]
        answers = [p.answer for p in problems for _ in range(n)]
        verdicts = verifier.score(list(zip(answers, texts, strict=True)))
        count = ranks.sum_values(
            {
                "responses": len(samples),
                "right": sum(v.score for v in verdicts),
                "boxed": sum(last_boxed(t) is not None for t in texts),
                "tokens": sum(len(s.ids) for s in samples),
            }
        )
        values[name] = count["right"] / count["responses"]
        if name == "greedy":
            values["format"] = count["boxed"] / count["responses"]
            values["response_length"] = count["tokens"] / count["responses"]
    return values


def run(cfg: RunConfig) -> dict[str, float]:
    """Evaluates the model of `cfg` on the task's held-out problems."""
    from .responses import open_sampler

    tokenizer = load_tokenizer(cfg.model)
    problems = usable(tokenizer, load_task(cfg.task, cfg.seed).held_out(), cfg.task.bad_rows)
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
