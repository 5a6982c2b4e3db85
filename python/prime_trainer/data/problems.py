"""What a task is made of: problems, each with the messages of its prompt and its reference answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..config.sections import TaskConfig
from ..verify.answers import Answer


@dataclass(frozen=True)
class Problem:
    """A question and all that the verifier needs to score an answer to it."""

    id: str
    messages: list[dict[str, str]]
    """The chat that the model sees, without the answer."""
    answer: Answer

    @property
    def reference(self) -> str:
        """The reference answer, for people to read; empty where a task has none, as for programs."""
        return self.answer.reference


class Task(Protocol):
    """A source of problems."""

    name: str

    def train(self, start: int, count: int) -> list[Problem]:
        """Returns the problems at positions `start` to `start + count - 1` of the unending training stream."""
        ...

    def held_out(self) -> list[Problem]:
        """Returns the evaluation problems; none of their questions occurs in the training stream."""
        ...


def messages_for(cfg: TaskConfig, question: str) -> list[dict[str, str]]:
    """Returns the chat that asks `question`: the system prompt, if one is set, and the filled-in template."""
    system = [] if cfg.system_prompt is None else [{"role": "system", "content": cfg.system_prompt}]
    # Not str.format: questions and templates are full of LaTeX braces.
    return [*system, {"role": "user", "content": cfg.template.replace("{question}", question)}]
