"""How an answer becomes a score. Runs in the worker process alone: these libraries may evaluate what they read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, cast

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

    def score(answer: GymAnswer, text: str) -> float:
        entry = decode(answer.entry)
        text = _unwrap(text)
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
    from math_verify import parse, verify

    parse("\\boxed{1}", parsing_timeout=None)  # builds the grammar, which the first answer should not pay for

    def score(answer: MathAnswer, text: str) -> float:
        gold = answer.answer
        if plain(gold) == plain(text):
            return 1.0
        based = _BASED.fullmatch(plain(gold)), _BASED.fullmatch(plain(text))
        if based[0] and based[1]:  # math-verify leaves the base out
            return float(based[0].groups() == based[1].groups())
        numbers = _NUMBER.fullmatch(plain(gold)), _NUMBER.fullmatch(plain(text))
        if answer.tolerance is not None and numbers[0] and numbers[1]:
            # A hair more: 4.3 - 4.2 is 0.0999.. or 0.1000..1, as floats happen to be.
            difference = abs(float(numbers[1][1]) - float(numbers[0][1]))
            return float(difference <= answer.tolerance * (1 + 1e-9))
        # No limits inside (they are signals, and C code ignores them): the trainer kills a worker that takes too long.
        parsed = parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=True)
        wanted = parse(f"\\boxed{{{gold}}}", parsing_timeout=None, raise_on_error=True)
        return float(verify(wanted, parsed, timeout_seconds=None, raise_on_error=True))

    return score


_BASED = re.compile(r"(\w+)_\{?(\d+)\}?")
_NUMBER = re.compile(r"([-+]?\d*\.?\d+(?:e[-+]?\d+)?)\\?%?")


def plain(latex: str) -> str:
    """The text without what does not change its meaning: equal results are equal answers."""
    return re.sub(r"\s+|\\[,;!:]|\\left|\\right|\$", "", latex).rstrip(".").replace("dfrac", "frac")
