"""`prime-trainer plan --calibrate`: rates of this device for `plan.seconds`, by a minute of a run's own passes.

One model of the configuration stands for policy and PRM. Groups are of random tokens, responses between half and one
and a half times as long as given, in the run's layout, as many as one forward pass of a minibatch holds. Nothing is
written.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .config.run_config import RunConfig
from .data.groups import Group, Response
from .models import loading, tokenizers
from .models.protocols import CausalLM
from .plan import seconds
from .rollout import Sampling, TransformersSampler
from .train.batch import Batch
from .train.policy_step import Targets, policy_update
from .train.prm_objective import Objective, backward
from .train.prm_step import Scorer
from .train.trainable import Trainable

ROUNDS = 3
"""Of each probe after one that does not count; their median is the rate."""
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
    device, limit, n = model.device, cfg.micro_batch_tokens, cfg.rollout.n
    trained = _Clocked(model, lr=1e-12, grad_clip=1.0)

    def batch_of(count: int) -> Batch:
        groups = _groups(model, count, n, prompt_tokens, response_tokens, cfg.rollout.max_new_tokens)
        return Batch.for_model(model, groups)

    def minibatch(parts: int) -> Batch:
        """As many groups as one pass of one of `parts` minibatches holds."""
        count = 1
        while count < cfg.rollout.prompts_per_step // parts:
            if len(batch_of(count + 1).micro_batches(range(count + 1), limit)) > 1:
                break
            count += 1
        return batch_of(count)

    def a_group(batch: Batch, work: Callable[[Batch], object], trains: bool = True) -> float:
        taken = _median(lambda: work(batch), device, trained if trains else None)
        return taken * n * response_tokens / batch.num_tokens

    def score(batch: Batch) -> None:
        Scorer(model, None, limit).log_probs(model, batch, [range(len(batch.groups))])

    def prm(batch: Batch) -> None:
        everything, zeros = range(len(batch.groups)), torch.zeros(batch.num_tokens, device=device)
        loss = Objective(batch, everything, cfg.prm.kind, cfg.prm.scale, margin=cfg.prm.margin).loss
        backward(model, batch, everything, zeros, loss, limit, coupled=False)
        trained.step()

    def policy(batch: Batch) -> None:
        zeros = torch.zeros(batch.num_tokens, device=device)
        targets = Targets(
            torch.linspace(-1.0, 1.0, batch.num_tokens, device=device),
            zeros if cfg.needs.ppo_ratio else None, zeros if cfg.policy.kl_coef > 0 else None,
        )  # fmt: skip
        policy_update(
            trained, batch, targets, cfg.policy, micro_batch_tokens=limit, parts=[range(len(batch.groups))],
            temperature=cfg.rollout.temperature,
        )  # fmt: skip

    of_prm, of_policy = minibatch(cfg.prm.minibatches), minibatch(cfg.policy.minibatches)
    passes = a_group(of_prm, score, trains=False), a_group(of_prm, prm), a_group(of_policy, policy)
    return seconds.Rates(*passes, statistics.median(trained.spent[1:]), *_sampling(cfg, model, prompt_tokens))


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


def _median(work: Callable[[], object], device: torch.device, trained: _Clocked | None = None) -> float:
    """Seconds of `work`, those of the optimizer step in it left out."""
    found = []
    for _ in range(1 + ROUNDS):
        begin = _now(device)
        work()
        found.append(_now(device) - begin - (0.0 if trained is None else trained.spent[-1]))
    return statistics.median(found[1:])


def _sampling(cfg: RunConfig, model: CausalLM, prompt_tokens: int) -> tuple[float | None, float, float]:
    """Seconds of the first token of a batch of responses, the overhead of one more, and what each batch adds to it."""
    if cfg.rollout.engine != "transformers":
        return None, 0.0, 0.0
    sampler = TransformersSampler(model, tokenizers.load_tokenizer(cfg.model), batch_size=cfg.rollout.batch_size)
    sampler.stops = torch.tensor([-1], device=model.device)  # every response has the length asked for
    whole = min(cfg.rollout.prompts_per_step, max(1, cfg.rollout.batch_size // cfg.rollout.n))

    def sample(prompts: int, tokens: int) -> float:
        given = [group.prompt_ids for group in _groups(model, prompts, 1, prompt_tokens, 1, 1)]
        sampling = Sampling(tokens, cfg.rollout.temperature)
        return _median(lambda: sampler.generate(given, cfg.rollout.n, sampling, list(range(prompts))), model.device)

    def one_more(prompts: int) -> tuple[float, float]:
        """(seconds of the first token, of one more) of responses to some prompts."""
        short, long = (sample(prompts, tokens) for tokens in TOKENS)
        more = max(0.0, (long - short) / (TOKENS[1] - TOKENS[0]))
        return max(0.0, short - (TOKENS[0] - 1) * more), more

    first, of_whole = one_more(whole)
    part = max(1, whole // 4)
    if part == whole:
        return first, 0.0, of_whole
    of_part = one_more(part)[1]
    # A line through both: what is left at no responses is overhead.
    overhead = min(of_whole, max(0.0, (of_part * whole - of_whole * part) / (whole - part)))
    return first, overhead, of_whole - overhead


def _groups(model: CausalLM, count: int, n: int, prompt_tokens: int, mean: int, most: int) -> list[Group]:
    """Responses of `mean` / 2 to 3 `mean` / 2 tokens, at most `most`."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.get_output_embeddings().weight)

    def below(low: int, high: int, shape: int) -> list[int]:
        return torch.randint(low, high + 1, (shape,), generator=generator).tolist()

    def ids(length: int) -> list[int]:
        return below(min(3, vocabulary - 1), vocabulary - 1, length)

    lengths = [min(most, length) for length in below(max(1, mean // 2), max(1, mean + mean // 2), count * n)]
    return [
        Group(ids(prompt_tokens), [Response(ids(lengths[g * n + k]), float(k % 2)) for k in range(n)])
        for g in range(count)
    ]
