"""Problems of reasoning-gym, made as they are drawn."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..config.sections import TaskConfig
from ..config.suggest import did_you_mean
from ..verify.answers import GymAnswer, OwnReward
from .problems import Problem, messages_for

_CHUNK = 256  # positions that share a dataset object


_SPARES = 16  # further problems for a position, in the same dataset object


_ATTEMPTS = 256


class ReasoningGymTask:
    """An unending stream of one reasoning-gym dataset, and a held-out set that is the same for every seed.

    reasoning-gym seeds item `i` of a dataset with `seed + i`, so neighbouring seeds share nearly all items. Here every
    chunk of positions has its own seed, derived by hashing.
    """

    def __init__(self, cfg: TaskConfig, seed: int) -> None:
        self.name, self.bad_rows = cfg.name, cfg.bad_rows
        self._cfg = cfg
        self._seed = seed
        self._create = _dataset_factory(cfg.name, cfg.params)
        self._chunk = lru_cache(maxsize=4)(self._make_chunk)
        self._held_out = self._make_held_out()
        self._held_out_questions = {p.messages[-1]["content"] for p in self._held_out}
        self._problem(0)  # a task whose held-out problems use up all its questions should fail now

    def train(self, start: int, count: int) -> list[Problem]:
        return [self._problem(position) for position in range(start, start + count)]

    def held_out(self) -> list[Problem]:
        return list(self._held_out)

    def _problem(self, position: int) -> Problem:
        for attempt in range(_ATTEMPTS):
            problem = self._draw(f"train/{self._seed}", position, attempt)
            if problem.messages[-1]["content"] not in self._held_out_questions:
                return problem
        raise ValueError(
            f"task.eval_size = {self._cfg.eval_size} leaves no question of {self.name!r} for training "
            f"({_ATTEMPTS} draws gave held-out questions only): lower it or widen task.params"
        )

    def _make_held_out(self) -> list[Problem]:
        size = self._cfg.eval_size
        problems: dict[str, Problem] = {}
        for position in range(size * _SPARES):
            problem = self._draw("held-out", position, 0)
            problems.setdefault(problem.messages[-1]["content"], problem)
            if len(problems) == size:
                return list(problems.values())
        raise ValueError(
            f"task.eval_size must not exceed the distinct questions of {self.name!r}, got {size}, "
            f"found {len(problems)} in {size * _SPARES} draws: lower it or widen task.params"
        )

    def _draw(self, stream: str, position: int, attempt: int) -> Problem:
        from ..verify.sandboxed.codec import encode

        chunk, offset = divmod(position, _CHUNK)
        epoch, spare = divmod(attempt, _SPARES)
        try:
            item = self._chunk(f"{stream}/{chunk}/{epoch}")[spare * _CHUNK + offset]
            known = {key: item[key] for key in ("question", "answer", "metadata")}
            entry = encode(known)
        except Exception as error:
            raise ValueError(
                f"task.params: reasoning-gym's {self.name!r} cannot make a problem with {self._cfg.params!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        answer: GymAnswer | OwnReward = GymAnswer(self.name, entry, self._cfg.params)
        if self._cfg.reward is not None:
            answer = OwnReward(json.loads(json.dumps(known, default=str)))
        return Problem(f"{self.name}/{stream}/{position}", messages_for(self._cfg, item["question"]), answer)

    def _make_chunk(self, key: str) -> Any:
        digest = hashlib.sha256(f"{self.name}/{key}".encode()).digest()
        # 30 bits: seed + index must stay within what numpy takes as a seed.
        return self._create(int.from_bytes(digest[:4], "big") >> 2, _CHUNK * _SPARES)


def _dataset_factory(name: str, params: dict[str, Any]) -> Callable[[int, int], Any]:
    """Returns `(seed, size) -> dataset` after checking the name and the parameters."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = did_you_mean(name, DATASETS, most=3, show=repr)
        raise ValueError(
            f"task.name must be a reasoning-gym dataset, got {name!r}"
            f"{close or f'; there are {len(DATASETS)}, such as chain_sum, countdown, knights_knaves'}"
        )
    fields = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for key in params:
        if key in ("seed", "size"):
            raise ValueError(f"task.params must not set {key!r}: the run's seed and steps decide it")
        if key not in fields:
            raise ValueError(
                f"task.params for {name!r} has no {key!r}{did_you_mean(key, fields, most=3, show=repr)}; "
                f"it takes {', '.join(fields)}"
            )

    def create(seed: int, size: int) -> Any:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **params)

    try:
        create(0, 1)
    except Exception as error:  # the library checks its parameters with assertions and plain code alike
        raise ValueError(f"task.params for {name!r}: {str(error) or type(error).__name__}, got {params!r}") from error
    return create
