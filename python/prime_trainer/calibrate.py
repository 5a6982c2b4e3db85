"""`prime-trainer plan --calibrate`: rates of this device for `plan.seconds`, by a minute of a run's own passes.

One model of the configuration stands for policy and PRM; groups are random tokens at the lengths given, in the run's
layout, as many as one forward pass holds. Nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .config.run_config import RunConfig
from .data.groups import Group, Response
from .models import loading, tokenizers, traits
from .models.protocols import CausalLM
from .plan import seconds
from .rollout import Sampling, TransformersSampler
from .train.batch import Batch
from .train.policy_step import Targets, policy_update
from .train.prm_objective import Objective, backward
from .train.prm_step import Scorer
from .train.trainable import Trainable

ROUNDS = 2
"""Of each probe after one that does not count; the least of them is the rate."""
TOKENS = (4, 20)
"""Of responses that are sampled; their difference gives the rate of a token."""


def run(cfg: RunConfig, prompt_tokens: int, response_tokens: int | None = None) -> str:
    """The seconds of a step as Markdown; `response_tokens` None is `rollout.max_new_tokens`."""
    if cfg.algorithm.candidates.coef > 0:
        raise ValueError("plan --calibrate: algorithm.candidates.coef must be 0, passes of candidates are not probed")
    length = cfg.rollout.max_new_tokens if response_tokens is None else response_tokens
    rates = probe(cfg, prompt_tokens, length)
    found = seconds.predict(rates, cfg.needs, cfg.policy, cfg.prm, cfg.rollout, length)
    return seconds.render(rates, found, cfg.rollout, length)


def probe(cfg: RunConfig, prompt_tokens: int, response_tokens: int) -> seconds.Rates:
    """Measures one pass of each kind, an optimizer step and, with the transformers engine, sampling."""
    model = loading.load_model(cfg.model)
    device, size = model.device, len(model.get_output_embeddings().weight)
    trained = _Clocked(model, lr=1e-12, grad_clip=1.0)

    def groups(count: int) -> list[Group]:
        return _groups(count, cfg.rollout.n, prompt_tokens, response_tokens, size)

    def batch_of(count: int) -> Batch:
        return Batch(groups(count), device, layout=traits.of(model).layout)

    count, limit = 1, cfg.micro_batch_tokens
    while count < cfg.rollout.prompts_per_step and len(batch_of(count + 1).micro_batches(range(count + 1), limit)) == 1:
        count += 1
    batch, everything = batch_of(count), range(count)
    zeros = torch.zeros(batch.num_tokens, device=device)
    targets = Targets(
        torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0)).to(device),
        zeros if cfg.needs.ppo_ratio else None, zeros if cfg.policy.kl_coef > 0 else None,
    )  # fmt: skip

    def score() -> None:
        Scorer(model, None, limit).log_probs(model, batch, [everything])

    def prm() -> None:
        loss = Objective(batch, everything, cfg.prm.kind, cfg.prm.scale, margin=cfg.prm.margin).loss
        backward(model, batch, everything, zeros, loss, limit, coupled=False)
        trained.step()

    def policy() -> None:
        policy_update(
            trained, batch, targets, cfg.policy, micro_batch_tokens=limit, parts=[everything],
            temperature=cfg.rollout.temperature,
        )  # fmt: skip

    of_prm, of_policy = (_least(work, device, trained) for work in (prm, policy))
    first, following = _sampling(cfg, model, prompt_tokens)
    return seconds.Rates(count, _least(score, device), of_prm, of_policy, min(trained.spent), first, following)


class _Clocked(Trainable):
    """Keeps the seconds of its optimizer steps."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.spent: list[float] = []

    def step(self, lr_scale: float = 1.0) -> float:
        begin = _now(self.model.device)
        norm = super().step(lr_scale)
        self.spent.append(_now(self.model.device) - begin)
        return norm


def _now(device: torch.device) -> float:
    """When what has been queued is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _least(work: Callable[[], object], device: torch.device, trained: _Clocked | None = None) -> float:
    """Seconds of `work`, those of optimizer steps in it left out."""
    found = []
    for _ in range(1 + ROUNDS):
        begin = _now(device)
        work()
        found.append(_now(device) - begin - (0.0 if trained is None else trained.spent[-1]))
    return min(found[1:])


def _sampling(cfg: RunConfig, model: CausalLM, prompt_tokens: int) -> tuple[float | None, float]:
    """Seconds of the first token of a batch of responses, and of one more of each."""
    if cfg.rollout.engine != "transformers":
        return None, 0.0
    sampler = TransformersSampler(model, tokenizers.load_tokenizer(cfg.model), batch_size=cfg.rollout.batch_size)
    sampler.stops = torch.tensor([-1], device=model.device)  # every response has the length asked for
    size = len(model.get_output_embeddings().weight)
    prompts = min(cfg.rollout.prompts_per_step, max(1, cfg.rollout.batch_size // cfg.rollout.n))
    given = [group.prompt_ids for group in _groups(prompts, 1, prompt_tokens, 1, size)]

    def sample(tokens: int) -> float:
        sampling = Sampling(tokens, cfg.rollout.temperature)
        return _least(lambda: sampler.generate(given, cfg.rollout.n, sampling, list(range(prompts))), model.device)

    short, long = map(sample, TOKENS)
    following = (long - short) / (TOKENS[1] - TOKENS[0])
    return max(0.0, short - (TOKENS[0] - 1) * following), following


def _groups(count: int, n: int, prompt_tokens: int, response_tokens: int, vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(min(3, vocabulary - 1), vocabulary, (length,), generator=generator).tolist()

    return [
        Group(ids(prompt_tokens), [Response(ids(response_tokens), float(k % 2)) for k in range(n)])
        for _ in range(count)
    ]
