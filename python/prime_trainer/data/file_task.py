"""Problems from JSONL and parquet files.

A row is either in the Eurus-2-RL-Data schema (`prompt`, `ability`, `reward_model.ground_truth`; `data_source` and
`extra_info` are not needed) or a plain pair (`question` or `problem`, and `answer`), as benchmark files have it.
"""

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.sections import TaskConfig
from ..verify import confinement_for
from ..verify.answers import CallTests, MathAnswer, ProgramTests, StdioTests
from . import chat
from .problems import Problem, messages_for
from .readers import read_rows

_DEFAULT_TEMPLATE = TaskConfig.model_fields["template"].default


class FileTask:
    """Mathematics and code problems of a file, reshuffled every epoch."""

    def __init__(self, cfg: TaskConfig, seed: int) -> None:
        if cfg.path is None:
            raise ValueError(f"task.path is required when task.kind = {cfg.kind!r}")
        self.name = cfg.path.stem
        rows = _read_problems(cfg.path, cfg.kind, cfg, "task.path")
        if cfg.eval_path is not None:
            kind = "parquet" if cfg.eval_path.suffix == ".parquet" else "jsonl"
            self._held_out = _read_problems(cfg.eval_path, kind, cfg, "task.eval_path")[: cfg.eval_size]
        else:
            self._held_out, rows = rows[: cfg.eval_size], rows[cfg.eval_size :]
        questions = {problem.messages[-1]["content"] for problem in self._held_out}
        self._rows = [problem for problem in rows if problem.messages[-1]["content"] not in questions]
        if not self._rows:
            raise ValueError(
                f"task.path: no problem of {cfg.path} is left beside the {len(self._held_out)} held-out ones: "
                f"lower task.eval_size (it is {cfg.eval_size}) or give other problems in task.eval_path"
            )
        self._order = lru_cache(maxsize=2)(lambda epoch: _shuffled(len(self._rows), seed, epoch))

    def train(self, start: int, count: int) -> list[Problem]:
        found = []
        for position in range(start, start + count):
            epoch, index = divmod(position, len(self._rows))
            found.append(self._rows[self._order(epoch)[index]])
        return found

    def held_out(self) -> list[Problem]:
        return list(self._held_out)


def _shuffled(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _read_problems(path: Path, kind: str, cfg: TaskConfig, option: str) -> list[Problem]:
    if not path.is_file():
        raise ValueError(f"{option}: no such file: {path}")
    problems: list[Problem] = []
    for place, row in read_rows(path, option, kind):
        try:
            ability = row.get("ability", "math")
            if ability not in _ANSWERS:
                raise ValueError(f"ability must be 'math' or 'code', got {ability!r}")
            problems.append(Problem(f"{path.stem}/{len(problems)}", _messages(row, cfg), _ANSWERS[ability](row)))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
    if not problems:
        raise ValueError(f"{option}: {path} has no rows")
    if any(isinstance(problem.answer, ProgramTests) for problem in problems):
        confinement_for(cfg)  # a machine that cannot run programs says so before anything is trained
    return problems


def _messages(row: dict[str, Any], cfg: TaskConfig) -> list[dict[str, str]]:
    prompt = row.get("prompt", row.get("question", row.get("problem")))
    messages = chat.prompt(prompt, "prompt")
    if isinstance(prompt, str):
        return messages_for(cfg, prompt)
    # A chat is kept as it is, but what the configuration sets acts.
    if cfg.template != _DEFAULT_TEMPLATE:
        messages[-1]["content"] = cfg.template.replace("{question}", messages[-1]["content"])
    return chat.with_system(messages, cfg.system_prompt)


def _math_answer(row: dict[str, Any]) -> MathAnswer:
    if "reward_model" in row:
        field, truth = "reward_model.ground_truth", _ground_truth(row)
    else:
        field, truth = "reward_model" if "prompt" in row else "answer", row.get("answer")
    return MathAnswer(reference_text(truth, field))


def reference_text(truth: Any, field: str) -> str:
    """A reference answer as text; raises ValueError, naming `field`, for what is none."""
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)  # 142.0 in a benchmark file is the answer 142
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)) or not str(truth).strip():
        raise ValueError(f"{field} must hold the reference answer as text or a number, got {truth!r:.100}")
    return str(truth)


def _code_answer(row: dict[str, Any]) -> ProgramTests:
    field, truth = "reward_model.ground_truth", _ground_truth(row)
    if isinstance(truth, str):
        try:
            truth = json.loads(truth)
        except ValueError as error:
            raise ValueError(f"{field} of a code problem must be JSON: {error}") from None
    tests = truth if isinstance(truth, dict) else {}
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{field} must have as many inputs as outputs, at least one, got {truth!r:.100}")
    name = tests.get("fn_name")
    if not name:
        texts = [
            [_as_text(v, f"{field}.{key}[{i}]") for i, v in enumerate(tests[key])] for key in ("inputs", "outputs")
        ]
        return StdioTests(*texts)
    calls = [_arguments(value, f"{field}.inputs[{i}]") for i, value in enumerate(inputs)]
    return CallTests(str(name), calls, outputs)


def _ground_truth(row: dict[str, Any]) -> Any:
    model = row.get("reward_model")
    return model.get("ground_truth") if isinstance(model, dict) else None


def _as_text(value: Any, field: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        value = "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text or a list of lines, got {value!r:.100}")
    return value


def _arguments(value: Any, field: str) -> list[Any]:
    """A list is the arguments; a text has one JSON value a line."""
    if isinstance(value, str):
        try:
            return [json.loads(line) for line in value.splitlines()]
        except ValueError as error:
            raise ValueError(f"{field} must have one JSON value a line: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"{field} must be the list of arguments, got {value!r:.100}")
    return value


_ANSWERS = {"math": _math_answer, "code": _code_answer}
