"""Suggestions for a misspelt name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, show: Callable[[str], str] = str) -> str:
    """`; did you mean X or Y?` with at most `most` of the `known` names closest to `word`; empty if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=most)
    return f"; did you mean {' or '.join(map(show, matches))}?" if matches else ""
