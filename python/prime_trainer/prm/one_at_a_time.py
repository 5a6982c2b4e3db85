"""What scoring costs beside the plain way: a pass of each model for each response, with all its logits.

So do snippets on model cards: no batches, a float32 log-softmax over the vocabulary, a gather. The boundaries of steps
are ours, so that both ways give the same rewards.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import prime_kernels as pk

from ..config.sections import ScoreValue
from ..models.protocols import CausalLM
from .step_scorer import Encoded, StepRewards, StepScorer, means


@dataclass(frozen=True)
class Comparison:
    """Both ways on the same responses, in the same process."""

    responses: int
    seconds: float
    plain_seconds: float
    largest_difference: float
    """Of cumulative rewards of steps."""


def compare(encoded: Sequence[Encoded], scorer: StepScorer, pair: tuple[CausalLM, CausalLM]) -> Comparison:
    """`pair` are the PRM and the reference of `scorer`. Both ways first score one response untimed."""
    if not encoded:
        raise ValueError("encoded: expected at least one response, got none")
    scorer.score(encoded[:1])
    plain_rewards(encoded[0], pair, scorer.beta, scorer.value)
    began = time.perf_counter()
    batched = scorer.score(encoded)
    seconds, began = time.perf_counter() - began, time.perf_counter()
    plain = [plain_rewards(each, pair, scorer.beta, scorer.value) for each in encoded]
    plain_seconds = time.perf_counter() - began
    gaps = [
        abs(one - other)
        for ours, theirs in zip(batched, plain, strict=True)
        if isinstance(ours, StepRewards)
        for one, other in zip(ours.cumulative, theirs, strict=True)
    ]
    return Comparison(len(encoded), seconds, plain_seconds, max(gaps, default=0.0))


@torch.no_grad()
def plain_rewards(
    each: Encoded, pair: tuple[CausalLM, CausalLM], beta: float, value: ScoreValue = "sum"
) -> list[float]:
    """The cumulative rewards of the steps of one response."""
    first, response = len(each.prompt_ids), each.response
    ids = torch.tensor([[*each.prompt_ids, *response.ids]], device=pair[0].device)
    prm, reference = (
        model(input_ids=ids).logits[0, first - 1 : -1].float().log_softmax(-1).gather(1, ids[0, first:, None])[:, 0]
        for model in pair
    )
    offsets = torch.tensor(response.cu_steps, device=ids.device)
    rewards = beta * (prm - reference)
    sums = pk.step_rewards(rewards, offsets, offsets[[0, -1]], mode="cumulative").tolist()
    return sums if value == "sum" else means(sums, response.cu_steps)
