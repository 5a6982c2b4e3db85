"""A prompt and its responses, the unit that a step is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Response:
    ids: list[int]
    outcome: float = 0.0
    logprobs: list[float] | None = None
    """The sampler's log-probs."""
    truncated: bool = False
    weight_version: int = 0
    """Updates that the policy which sampled had seen."""


@dataclass(frozen=True)
class Group:
    """A prompt and its responses; `problem` is where it came from, `prompt_text` and `reference` are for people."""

    prompt_ids: list[int]
    responses: Sequence[Response]
    problem: str = ""
    prompt_text: str = ""
    reference: str = ""

    @property
    def accuracy(self) -> float:
        return sum(r.outcome for r in self.responses) / len(self.responses)


def group_from(fields: dict[str, Any]) -> Group:
    """The inverse of `dataclasses.asdict`."""
    return Group(**{**fields, "responses": [Response(**response) for response in fields["responses"]]})


class TooLong(ValueError):
    """A response that does not fit with its prompt."""


def check_length(place: str, prompt_ids: Sequence[int], response: Response, limit: int) -> None:
    length = len(prompt_ids) + len(response.ids)
    if length > limit:
        raise TooLong(f"{place}: prompt and response have {length} tokens, over the limit of {limit}")


def fits(place: str, prompt_ids: Sequence[int], response: Response, limit: int, section: str, too_long: str) -> bool:
    """Whether to learn from a response. One that is too long is an error unless `too_long` of `section` is "skip"."""
    try:
        check_length(place, prompt_ids, response, limit)
    except TooLong as error:
        if too_long == "error":
            raise ValueError(f"{error} ({section}.too_long = 'skip' leaves such rows out)") from None
        return False
    return True
