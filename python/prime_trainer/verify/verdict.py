"""What a verifier says of one response."""

from __future__ import annotations

from typing import NamedTuple

TIME_LIMIT = "time limit"


class Verdict(NamedTuple):
    """The score of a response in [0, 1]; `failure` says why it could not be scored (the score is 0 then)."""

    score: float
    failure: str | None
