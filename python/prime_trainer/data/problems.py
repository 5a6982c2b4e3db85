"""What a task is made of: problems, each with the messages of its prompt and its reference answer."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ..config.sections import TaskConfig
from ..errors import RunError
from ..models.protocols import Tokenizer
from ..models.tokenizers import render
from ..verify.answers import Answer
from . import chat


@dataclass(frozen=True)
class Problem:
    """A question and all that the verifier needs to score an answer to it."""

    id: str
    messages: list[dict[str, str]]
    """The chat that the model sees, without the answer."""
    answer: Answer
    place: str = ""
    """Where it stands, for error messages: file and line."""

    @property
    def reference(self) -> str:
        """The reference answer, for people to read; empty where a task has none, as for programs."""
        return self.answer.reference


class BadRow(RunError, ValueError):
    """A problem that cannot be used; the message says which one and why."""


def prompt_ids(tokenizer: Tokenizer, problem: Problem) -> list[int]:
    """The tokens of a problem's prompt. Raises BadRow, naming the problem, for what the chat template refuses."""
    try:
        return render(tokenizer, problem.messages)
    except Exception as error:  # a template raises what it likes
        told = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(f"{problem.place or problem.id}: the prompt cannot be written in tokens: {told:.200}") from error


def usable(tokenizer: Tokenizer, problems: Sequence[Problem], bad_rows: str) -> list[Problem]:
    """The problems whose prompts can be written in tokens: all, or BadRow, unless `bad_rows` is "skip"."""
    found = []
    for problem in problems:
        try:
            prompt_ids(tokenizer, problem)
        except BadRow as error:
            if bad_rows == "error":
                raise BadRow(f"{error} (task.bad_rows = 'skip' leaves such rows out)") from None
            print(f"left out: {error}", file=sys.stderr)
            continue
        found.append(problem)
    return found


class Task(Protocol):
    """A source of problems."""

    name: str
    bad_rows: Literal["error", "skip"]
    """What to do with a problem that turns out to be a BadRow."""

    def train(self, start: int, count: int) -> list[Problem]:
        """Returns the problems at positions `start` to `start + count - 1` of the unending training stream."""
        ...

    def held_out(self) -> list[Problem]:
        """Returns the evaluation problems; none of their questions occurs in the training stream."""
        ...


def messages_for(cfg: TaskConfig, question: str) -> list[dict[str, str]]:
    """Returns the chat that asks `question`: the system prompt, if one is set, and the filled-in template."""
    # Not str.format: questions and templates are full of LaTeX braces.
    return chat.asking(cfg.template.replace("{question}", question), cfg.system_prompt)
