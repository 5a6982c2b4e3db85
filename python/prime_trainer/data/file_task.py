"""Problems from JSONL and parquet files.

A row is either in the Eurus-2-RL-Data schema (`prompt`, `ability`, `reward_model.ground_truth`; `data_source` and
`extra_info` are not needed) or a plain pair (`question` or `problem`, and `answer`), as benchmark files have it.
"""

from __future__ import annotations

import json
import math
import random
import sys
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..config.sections import TaskConfig
from ..run import hub
from ..verify import confinement_for
from ..verify.answers import CallTests, MathAnswer, OwnReward, ProgramTests, StdioTests
from . import chat
from .problems import Problem, messages_for
from .readers import Kind, check_text, kind_of, read_rows, refuse

_DEFAULT_TEMPLATE = TaskConfig.model_fields["template"].default


class FileTask:
    """Mathematics and code problems of a file, reshuffled every epoch."""

    def __init__(self, cfg: TaskConfig, seed: int) -> None:
        if cfg.path is None:
            raise ValueError(f"task.path is required when task.kind = {cfg.kind!r}")
        self.name, self.bad_rows = cfg.path.stem, cfg.bad_rows
        rows = _read_problems(cfg.path, "parquet" if cfg.kind == "parquet" else "jsonl", cfg, "task.path")
        if cfg.eval_path is not None:
            kind: Kind = "parquet" if kind_of(cfg.eval_path) == "parquet" else "jsonl"
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


def _read_problems(path: Path, kind: Kind, cfg: TaskConfig, option: str) -> list[Problem]:
    if not path.exists() and hub.data_name(path) is None:
        raise ValueError(f"{option}: no such file: {path}")
    problems: list[Problem] = []
    bad: list[ValueError] = []
    skips = cfg.bad_rows == "skip"
    for place, row in read_rows(path, option, kind, bad.append if skips else refuse):
        try:
            where = f"{path}, {place}"
            answer = problem_answer(row) if cfg.reward is None else OwnReward(_plain(row))
            if isinstance(answer, ProgramTests):
                _check_tests(answer, where)
            problems.append(Problem(f"{path.stem}/{len(problems)}", _messages(row, cfg), answer, where))
        except ValueError as error:
            told = ValueError(str(error) if str(error).startswith(str(path)) else f"{path}, {place}: {error}")
            if not skips:
                raise told from None
            bad.append(told)
    if bad:
        print(
            f"{option}: {len(bad)} of {len(bad) + len(problems)} rows of {path} are left out (task.bad_rows = 'skip'), "
            f"the first because of {bad[0]}",
            file=sys.stderr,
        )
    if not problems:
        raise ValueError(f"{option}: {path} has no rows{' that can be used' if bad else ''}")
    if any(isinstance(problem.answer, ProgramTests) for problem in problems):
        confinement_for(cfg)  # fails before training on a machine that cannot run programs
    return problems


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it; what JSON lacks, such as dates, as text."""
    plain: dict[str, Any] = json.loads(json.dumps(row, default=str))
    return plain


def _check_tests(answer: ProgramTests, where: str) -> None:
    """Tests may be JSON inside of a text: what the reader of the row has not seen."""
    tests = answer.to_json()
    check_text(tests, where)
    try:
        json.dumps(tests, allow_nan=False)
    except ValueError:
        raise ValueError("reward_model.ground_truth must not hold NaN or infinity: no output equals it") from None


def _messages(row: dict[str, Any], cfg: TaskConfig) -> list[dict[str, str]]:
    prompt = row.get("prompt", row.get("question", row.get("problem")))
    messages = chat.prompt(prompt, "prompt")
    if isinstance(prompt, str):
        return messages_for(cfg, prompt)
    # A chat is kept, but the template and the system prompt of the configuration apply.
    if cfg.template != _DEFAULT_TEMPLATE:
        messages[-1]["content"] = cfg.template.replace("{question}", messages[-1]["content"])
    return chat.with_system(messages, cfg.system_prompt)


def problem_answer(row: dict[str, Any]) -> MathAnswer | ProgramTests:
    """The reference answer of a row; raises ValueError that names the field that is not as expected."""
    ability = row.get("ability", "math")
    if ability == "math":
        return _math_answer(row)
    if ability == "code":
        return _code_answer(row)
    raise ValueError(f"ability must be 'math' or 'code', got {ability!r}")


def _math_answer(row: dict[str, Any]) -> MathAnswer:
    if "reward_model" in row:
        field, truth = "reward_model.ground_truth", _ground_truth(row)
    else:
        field, truth = "reward_model" if "prompt" in row else "answer", row.get("answer")
    return MathAnswer(reference_text(truth, field))


def reference_text(truth: Any, field: str) -> str:
    """A reference answer as text; raises ValueError, naming `field`, for what is none."""
    if isinstance(truth, float) and not math.isfinite(truth):
        # As text it would be an answer that no response can give.
        raise ValueError(f"{field} must be a finite number or text, got {truth}")
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)  # 142.0 in a benchmark file is the answer 142
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)) or not str(truth).strip():
        raise ValueError(f"{field} must hold the reference answer as text or a number, got {truth!r:.100}")
    return str(truth)


def _code_answer(row: dict[str, Any]) -> ProgramTests:
    field, truth = "reward_model.ground_truth", _ground_truth(row)
    if isinstance(truth, str):
        try:
            truth = _json(truth)
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
    wanted = [_output(out) if isinstance(given, str) else out for given, out in zip(inputs, outputs, strict=True)]
    return CallTests(str(name), calls, wanted)


def _output(value: Any) -> Any:
    """Where the arguments are JSON text, so is the result."""
    if not isinstance(value, str):
        return value
    try:
        return _json(value)
    except ValueError:
        return value  # some files have plain text there


def _json(text: str) -> Any:
    """JSON whose integers may have any number of digits; Python refuses to read more than 4,300."""
    return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 4_000 else int(Decimal(digits)))


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
            return [_json(line) for line in value.split("\n") if line.strip()]
        except ValueError as error:
            raise ValueError(f"{field} must have one JSON value a line: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"{field} must be the list of arguments, got {value!r:.100}")
    return value
