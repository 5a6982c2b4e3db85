"""Problems from JSONL and parquet files.

A row is either in the Eurus-2-RL-Data schema (`prompt`, `ability`, `reward_model.ground_truth`; `data_source` and
`extra_info` are not needed) or a plain pair (`question` or `problem`, and `answer`), as benchmark files have it.
"""

from __future__ import annotations

import random
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import chat
from .config import TaskConfig
from .rows import jsonl_rows, parquet_rows
from .tasks import Problem, messages_for

_DEFAULT_TEMPLATE = TaskConfig.model_fields["template"].default


class FileTask:
    """Mathematics problems of a file, reshuffled every epoch."""

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
    problems, total, code = [], 0, 0
    for place, row in parquet_rows(path, option) if kind == "parquet" else jsonl_rows(path):
        total += 1
        try:
            ability = row.get("ability", "math")
            if ability == "code":
                code += 1
                continue
            if ability != "math":
                raise ValueError(f"ability must be 'math' or 'code', got {ability!r}")
            problems.append(Problem(f"{path.stem}/{total - 1}", _messages(row, cfg), _answer(row)))
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
    if not total:
        raise ValueError(f"{option}: {path} has no rows")
    if not problems:
        raise ValueError(f"{option}: all {code} rows of {path} are code problems; only math is verified for now")
    if code:
        warnings.warn(
            f"{path}: skipped {code} code problems of {total} rows; only math is verified for now", stacklevel=2
        )
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


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    if "reward_model" in row:
        field, model = "reward_model.ground_truth", row["reward_model"]
        truth = model.get("ground_truth") if isinstance(model, dict) else None
    else:
        field = "reward_model" if "prompt" in row else "answer"
        truth = row.get("answer")
    if isinstance(truth, float) and truth.is_integer():
        truth = int(truth)  # 142.0 in a benchmark file is the answer 142
    if isinstance(truth, bool) or not isinstance(truth, (str, int, float)) or not str(truth).strip():
        raise ValueError(f"{field} must hold the reference answer as text or a number, got {truth!r:.100}")
    return {"kind": "math", "answer": str(truth)}
