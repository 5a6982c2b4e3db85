"""Responses to learn from or to score: rows of files become items, items become token groups.

A row has a prompt (`prompt`, `instruction`, `problem` or `question`: text, or a chat that ends with the user) and

* `response` (text, or a chat that ends with the assistant and then needs no prompt beside it), `conversation` (such a
  chat) or `steps` (a list of texts, joined by blank lines), with `label` in [0, 1] for training and `step_labels` for
  stage 2; or
* `completions` and `correctness`: several responses at once.

`finished: false` marks a response that was cut off: no end-of-sequence token follows it. All else is carried along.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.sections import Splitter
from ..data import chat
from ..data.groups import Group, Response
from ..data.readers import read_rows
from ..models import tokenizers
from ..models.protocols import Tokenizer
from . import steps

PROMPTS = ("prompt", "instruction", "problem", "question")
_PER_COMPLETION = {"completions": "response", "correctness": "label", "finished": "finished"}


@dataclass(frozen=True)
class Item:
    """A response to a prompt; `place` says where it stands, for error messages."""

    place: str
    messages: list[dict[str, str]]
    response: str
    parts: list[str] | None
    """The response cut into the steps that the row gives; None where a splitter is to find them."""
    label: float | None
    step_labels: list[float | None] | None
    finished: bool
    row: dict[str, Any] = field(repr=False)
    """The row; of one with completions, this completion's part."""


def read_items(path: Path, key: str) -> Iterator[Item]:
    """The responses of a JSONL or parquet file, in order. Errors name file, line and field."""
    empty = True
    for place, row in read_rows(path, key):
        empty = False
        yield from items_of(row, f"{path}, {place}")
    if empty:
        raise ValueError(f"{key}: {path} has no rows")


def items_of(row: Mapping[str, Any], place: str) -> Iterator[Item]:
    """One item, or one for each completion."""
    try:
        if "completions" not in row:
            yield _item(dict(row), place)
            return
        count = len(row["completions"]) if isinstance(row["completions"], (list, tuple)) else 0
        if not count:
            raise ValueError(f"completions must be a non-empty list, got {row['completions']!r:.100}")
        for name in _PER_COMPLETION:
            values = row.get(name)
            if values is not None and (not isinstance(values, (list, tuple)) or len(values) != count):
                raise ValueError(f"{name} must be a list of {count} values, one a completion, got {values!r:.100}")
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    shared = {name: value for name, value in row.items() if name not in _PER_COMPLETION}
    for k in range(count):
        own = {single: row[name][k] for name, single in _PER_COMPLETION.items() if row.get(name) is not None}
        try:
            yield _item(shared | own | {"completion": k}, place)
        except ValueError as error:
            raise ValueError(f"{place}: completions[{k}]: {error}") from None


def _item(row: dict[str, Any], place: str) -> Item:
    named = next((name for name in PROMPTS if row.get(name) is not None), None)
    messages = None if named is None else chat.prompt(row[named], named)
    chats = "response" if row.get("response") is not None else "conversation"
    response, given = row.get("response", row.get("conversation")), row.get("steps")
    if given is not None and response is None:
        if not isinstance(given, (list, tuple)) or not given:
            raise ValueError(f"steps must be a non-empty list, got {given!r:.100}")
        parts = steps.joined(given)
        response = "".join(parts)
    else:
        parts = None
        if isinstance(response, (list, tuple)):
            turns = chat.checked(list(response), chats, last="assistant")
            messages, response = [*(messages or []), *turns[:-1]], turns[-1]["content"]
        if not isinstance(response, str) or not response.strip():
            raise ValueError(f"response must be a non-empty string, got {response!r:.100}")
    if not messages:
        raise ValueError(f"a row needs its prompt ({', '.join(PROMPTS)}), got {sorted(row)}")
    return Item(
        place, messages, response, parts, outcome(row), _step_labels(row, parts), bool(row.get("finished", True)), row
    )


def _step_labels(row: dict[str, Any], parts: Sequence[str] | None) -> list[float | None] | None:
    labels = row.get("step_labels")
    if labels is None:
        return None
    count = 0 if parts is None else len(parts)
    if not isinstance(labels, (list, tuple)) or len(labels) != count:
        raise ValueError(f"step_labels must be a list of {count} values, one for each of steps, got {labels!r:.100}")
    return [None if label is None else _share(label, f"step_labels[{k}]") for k, label in enumerate(labels)]


def outcome(row: Mapping[str, Any]) -> float | None:
    """Whether the response is right, in [0, 1]. In ProcessBench's rows `label` is the first wrong step instead."""
    name = "final_answer_correct" if "final_answer_correct" in row else "label"
    return None if row.get(name) is None else _share(row[name], name)


def _share(value: Any, name: str) -> float:
    # Comparisons with NaN are false.
    if isinstance(value, (bool, int, float)) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{name} must be a number from 0 to 1, got {value!r:.100}")


@dataclass(frozen=True)
class StepResponse(Response):
    """A response with steps: `cu_steps` [S + 1] are the offsets in `ids` at which they start."""

    cu_steps: list[int] = field(default_factory=list)
    step_labels: list[float | None] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    """The text of each token."""
    steps: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StepGroup(Group):
    """A prompt and its responses, each with steps."""

    responses: Sequence[StepResponse]


def encode(tokenizer: Tokenizer, item: Item, splitter: Splitter) -> StepResponse:
    """The response in tokens, ended by the end-of-sequence token if it is finished, and where its steps start.

    The text is encoded once, as a whole; steps are placed by the characters that tokens cover.
    """
    parts = item.parts if item.parts is not None else steps.split(item.response, splitter)
    ids, spans = tokenizers.encode_with_spans(tokenizer, item.response)
    counts = steps.token_counts(parts, spans)
    if item.parts is None:
        parts, counts = steps.without_empty(parts, counts)
    if 0 in counts:
        raise ValueError(f"{item.place}: steps[{counts.index(0)}] has no token of its own")
    pieces, at = [], 0
    for _, end in spans:
        pieces.append(item.response[at : max(at, end)])
        at = max(at, end)
    if item.finished:
        ids = [*ids, tokenizer.eos_token_id]
        pieces.append(tokenizer.eos_token)
        counts[-1] += 1
    cu_steps = [0]
    for count in counts:
        cu_steps.append(cu_steps[-1] + count)
    labels = item.step_labels or []
    return StepResponse(ids, item.label or 0.0, cu_steps=cu_steps, step_labels=labels, pieces=pieces, steps=[*parts])


def grouped(pairs: Iterable[tuple[list[int], StepResponse]]) -> list[StepGroup]:
    """Responses to the same prompt together, in order of first appearance."""
    found: dict[tuple[int, ...], list[StepResponse]] = {}
    for prompt_ids, response in pairs:
        found.setdefault(tuple(prompt_ids), []).append(response)
    return [StepGroup(list(prompt_ids), responses) for prompt_ids, responses in found.items()]
