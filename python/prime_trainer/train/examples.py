"""A few responses of a step with their rewards, for people to read in the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.groups import Group
from ..models.protocols import Tokenizer
from .batch import Batch
from .prm_step import Rewards


def examples_of(
    batch: Batch, rewards: Rewards | None, advantages: Tensor, tokenizer: Tokenizer, count: int = 2
) -> list[dict[str, Any]]:
    """The best and the worst response of each of the first `count` groups, as rows of `samples.jsonl`."""
    shown = range(min(count, len(batch.groups)))
    tokens = batch.spans_of(shown)[1]
    columns = [advantages[tokens], *(() if rewards is None else (rewards.values[tokens],))]
    advantage, *reward = torch.stack(columns).tolist()  # one copy, which waits for the device
    rows = []
    for g in shown:
        group, spans = batch.groups[g], batch.response_spans(g)
        for k in _best_and_worst(group):
            response, span = group.responses[k], spans[k]
            rows.append(
                {
                    "prompt": group.prompt_text,
                    "tokens": tokenizer.batch_decode([[i] for i in response.ids]),
                    "process_rewards": reward[0][span] if reward else None,
                    "advantages": advantage[span],
                    "outcome": response.outcome,
                    "reference": group.reference,
                }
            )
    return rows


def _best_and_worst(group: Group) -> list[int]:
    """Their indices in order; one where all are alike."""
    outcomes = [response.outcome for response in group.responses]
    return sorted({outcomes.index(max(outcomes)), outcomes.index(min(outcomes))})
