"""Whether a text is the answer to a mathematical problem."""

from __future__ import annotations

from ..answers import MathAnswer
from ..extract import plain
from .equality import Options, equal
from .normalize import canonical, normalize
from .structure import read
from .tokens import TooLarge, Unreadable


def right(answer: MathAnswer, text: str) -> bool:
    """Whether a text is the answer: by the rules of `mathematics.equality`, or else by math-verify."""
    if plain(answer.answer) == plain(text):
        return True
    wanted, found = normalize(answer.answer), normalize(text)
    reference, given = wanted.text, found.renamed(wanted.parameter)
    if canonical(reference) == canonical(given):
        return True
    if not given:
        return False
    options = Options(answer.tolerance, answer.interval_as_inequality)
    try:
        return equal(read(reference), read(given), options)
    except TooLarge:
        return False
    except Unreadable:
        return _by_math_verify(reference, given, answer.interval_as_inequality)


def _by_math_verify(reference: str, given: str, interval_as_inequality: bool) -> bool:
    """For what the grammar here does not know: integrals, sums, limits."""
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, MatrixBase

    # No limits inside (they are signals, and C code ignores them): the trainer kills a worker that takes too long.
    config = [LatexExtractionConfig()]
    wanted, parsed = (
        [
            found
            for found in parse(f"\\boxed{{{text}}}", config, parsing_timeout=None, raise_on_error=True)
            if isinstance(found, (Basic, MatrixBase))
        ]
        for text in (reference, given)
    )
    if not wanted or not parsed:
        return False
    return bool(
        verify(
            wanted,
            parsed,
            float_rounding=12,
            numeric_precision=30,
            allow_set_relation_comp=interval_as_inequality,
            timeout_seconds=None,
            raise_on_error=True,
        )
    )
