"""A few responses of a step with their rewards, for people to read in the report."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..data.groups import Group
from ..models.protocols import Tokenizer
from .batch import Batch
from .prm_step import Rewards


def examples_of(
    batch: Batch, rewards: Rewards | None, advantages: Tensor, tokenizer: Tokenizer, count: int = 2
) -> list[dict[str, Any]]:
    """The best and the worst response of each of the first `count` groups, as rows of `samples.jsonl`."""
    first, starts = batch.cu_groups.tolist(), batch.cu_seqlens.tolist()
    rows = []
    for g, group in enumerate(batch.groups[:count]):
        for k in _best_and_worst(group):
            r, response = first[g] + k, group.responses[k]
            span = slice(starts[r], starts[r + 1])
            rows.append(
                {
                    "prompt": group.prompt_text,
                    "tokens": tokenizer.batch_decode([[i] for i in response.ids]),
                    "process_rewards": None if rewards is None else rewards.values[span].tolist(),
                    "advantages": advantages[span].tolist(),
                    "outcome": response.outcome,
                    "reference": group.reference,
                }
            )
    return rows


def _best_and_worst(group: Group) -> list[int]:
    """Their indices in order; one where all are alike."""
    outcomes = [response.outcome for response in group.responses]
    return sorted({outcomes.index(max(outcomes)), outcomes.index(min(outcomes))})
