"""The kinds of reference answers, and their JSON forms in stored files and on the workers' pipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MathAnswer:
    """A mathematical answer in LaTeX or plain text."""

    answer: str
    tolerance: float | None = None
    """Absolute difference up to which a number is right; None where the benchmark gives none."""
    interval_as_inequality: bool = True
    """Whether `x < 3` and `(-\\infty, 3)` are the same answer."""

    @property
    def reference(self) -> str:
        """The reference answer for people to read."""
        return self.answer

    def to_json(self) -> dict[str, Any]:
        form: dict[str, Any] = {"kind": "math", "answer": self.answer}
        if self.tolerance is not None:
            form["tolerance"] = self.tolerance
        return form if self.interval_as_inequality else form | {"interval_as_inequality": False}


@dataclass(frozen=True)
class GymAnswer:
    """An item of a reasoning-gym dataset, whose own scorer judges the answers."""

    dataset: str
    entry: dict[str, Any]
    """`question`, `answer` and `metadata` of the item, as `sandboxed.codec.encode` writes them."""
    params: dict[str, Any] | None = None
    """Parameters of the dataset; None means its defaults."""

    @property
    def reference(self) -> str:
        """The reference answer for people to read; empty where the dataset gives none."""
        found = self.entry.get("answer")
        return "" if found is None else str(found)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "reasoning_gym", "dataset": self.dataset, "params": self.params, "entry": self.entry}


@dataclass(frozen=True)
class StdioTests:
    """Tests of a program that reads standard input and writes standard output; one fresh process an input."""

    inputs: list[str]
    outputs: list[str]

    @property
    def reference(self) -> str:
        """Empty: tests are not an answer to read."""
        return ""

    def to_json(self) -> dict[str, Any]:
        return {"kind": "code", "form": "stdio", "inputs": self.inputs, "outputs": self.outputs}


@dataclass(frozen=True)
class CallTests:
    """Tests that call a function, or a method of a class `Solution`, and compare what it returns."""

    fn_name: str
    inputs: list[list[Any]]
    """The arguments of each call, as plain JSON."""
    outputs: list[Any]

    @property
    def reference(self) -> str:
        """Empty: tests are not an answer to read."""
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "code", "form": "calls", "fn_name": self.fn_name, "inputs": self.inputs, "outputs": self.outputs,
        }  # fmt: skip


@dataclass(frozen=True)
class AssertTests:
    """Tests that are trusted Python assertions about the program's functions."""

    tests: list[str]
    setup: str
    """Python that runs before the tests."""
    names: list[str]
    """The functions of the program that the tests call."""
    prelude: str = ""
    """Python put before the program: the code that the prompt shows."""

    @property
    def reference(self) -> str:
        """Empty: tests are not an answer to read."""
        return ""

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "code", "form": "asserts", "tests": self.tests, "setup": self.setup, "names": self.names,
            "prelude": self.prelude,
        }  # fmt: skip


@dataclass(frozen=True)
class OwnReward:
    """What a reward function of the user's is given beside a response."""

    problem: dict[str, Any]
    """The row of a file, or `question`, `answer` and `metadata` of reasoning-gym, as plain JSON."""

    @property
    def reference(self) -> str:
        """The reference answer for people to read; empty where the row has none."""
        found = self.problem.get("answer")
        return "" if found is None else str(found)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "reward", "problem": self.problem}


ScoredAnswer = MathAnswer | GymAnswer
"""Answers that a worker process scores."""
ProgramTests = StdioTests | CallTests | AssertTests
"""Answers that are tests of a program, which a sandbox runs."""
Answer = ScoredAnswer | ProgramTests | OwnReward

_CLASSES: dict[tuple[str, str | None], type[Answer]] = {
    ("math", None): MathAnswer,
    ("reasoning_gym", None): GymAnswer,
    ("reward", None): OwnReward,
    ("code", "stdio"): StdioTests,
    ("code", "calls"): CallTests,
    ("code", "asserts"): AssertTests,
}


def from_json(form: dict[str, Any]) -> Answer:
    """The inverse of `to_json`. Raises ValueError for an unknown kind and for missing or unknown fields."""
    fields = {key: value for key, value in form.items() if key not in ("kind", "form")}
    kind = form.get("kind"), form.get("form")
    if kind not in _CLASSES:
        known = ", ".join(f"{k} ({f})" if f else k for k, f in _CLASSES)
        raise ValueError(f"the kind (and form) of an answer must be one of {known}, got {kind!r}")
    try:
        return _CLASSES[kind](**fields)
    except TypeError as error:
        raise ValueError(f"an answer of kind {kind[0]!r}: {error}") from None


def scored_from_json(form: dict[str, Any]) -> ScoredAnswer:
    """`from_json` for what a confined worker scores; raises ValueError for programs and for rewards of the user's."""
    answer = from_json(form)
    if isinstance(answer, ProgramTests | OwnReward):
        raise ValueError(f"a worker process scores no programs, got an answer of kind {form['kind']!r}")
    return answer
