"""How an answer becomes a score. Runs in the worker process alone: these libraries may evaluate what they read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, cast

from . import contained
from .answers import GymAnswer, MathAnswer, ScoredAnswer
from .sandboxed.codec import decode

Scorer = Callable[[ScoredAnswer, str], float]

# reasoning-gym gives 0.01 to 0.05 for wrong but well-formed answers; that is not a share of a correct one.
_NOISE = 0.1


def load(answer: ScoredAnswer) -> Scorer:
    """Imports what scoring answers of this kind needs and returns the scorer: `(answer, text) -> [0, 1]`."""
    if isinstance(answer, MathAnswer):
        return cast(Scorer, _math_scorer())
    return cast(Scorer, _reasoning_gym_scorer(answer.dataset, answer.params or {}))


def load_key(answer: ScoredAnswer) -> str:
    """Answers with equal keys share a scorer."""
    kind = ["math"] if isinstance(answer, MathAnswer) else ["reasoning_gym", answer.dataset, answer.params]
    return json.dumps(kind, sort_keys=True)


def _reasoning_gym_scorer(name: str, params: dict[str, Any]) -> Callable[[GymAnswer, str], float]:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(name, seed=0, size=1, **params)
    contained.prepare(name, type(dataset).__module__)

    def score(answer: GymAnswer, text: str) -> float:
        entry = decode(answer.entry)
        text = _unwrap(text)
        if not contained.readable(answer, text):
            return 0.0
        return _settle(float(dataset.score_answer(text, entry)), text, entry.get("answer"))

    return score


def _settle(raw: float, text: str, oracle: Any) -> float:
    """Clips a reasoning-gym score and removes the credits that a wrong answer in a box does not deserve.

    Many scorers pay `len(oracle) / len(text)` when the right answer merely occurs in the text: 0.5 for 15 where 5 is
    right. A box holds the answer alone, so this counts as wrong, as does everything below 0.1.
    """
    if not math.isfinite(raw) or raw < _NOISE:
        return 0.0
    contained = isinstance(oracle, str) and oracle != text and oracle in text
    if contained and raw < 1.0 and math.isclose(raw, len(oracle) / len(text)):
        return 0.0
    return min(raw, 1.0)


_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\$([^$]*)\$", re.DOTALL)


def _unwrap(text: str) -> str:
    r"""Removes the `\text{...}` or `$...$` around a whole answer: the scorers expect plain text."""
    match = _WRAPPED.fullmatch(text)
    return text if match is None else next(g for g in match.groups() if g is not None).strip()


def _math_scorer() -> Callable[[MathAnswer, str], float]:
    from math_verify import parse

    from .mathematics.judge import right

    parse("\\boxed{1}", parsing_timeout=None)  # builds the grammar, which the first answer should not pay for
    return lambda answer, text: float(right(answer, text))
