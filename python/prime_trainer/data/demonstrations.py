r"""Answers to imitate in the SFT warm-up, made from a task's own problems when there is no chat data.

`direct`: the answer at once, for every task. `worked`: its steps first, for the tasks that have a writer here.
"""

from __future__ import annotations

import random
import re
from typing import Any

from ..run.seeds import derive_seed
from ..verify.answers import GymAnswer
from .problems import Problem, Task


def direct(problem: Problem) -> str:
    return rf"\boxed{{{problem.reference}}}"


def worked(problem: Problem) -> str:
    answer = problem.answer
    dataset = answer.dataset if isinstance(answer, GymAnswer) else "file"
    if not isinstance(answer, GymAnswer) or dataset not in _WRITERS:
        raise ValueError(
            f"no worked solutions can be made for {dataset!r} problems "
            f"(there are writers for {', '.join(sorted(_WRITERS))}); set sft.path to chat data "
            "or sft.worked_fraction = 0"
        )
    return f"{_WRITERS[dataset](answer.entry)}\n{direct(problem)}"


def make(task: Task, count: int, worked_fraction: float, seed: int) -> list[tuple[Problem, str]]:
    """`count` problems of the training stream, each with an answer; which ones are worked depends on `seed`."""
    rng = random.Random(derive_seed(seed, "demonstrations"))
    return [(p, worked(p) if rng.random() < worked_fraction else direct(p)) for p in task.train(0, count)]


def _running_totals(entry: dict[str, Any]) -> str:
    """`7 + 12 - 5`: the partial sums from the left, one step a line."""
    expression = entry["metadata"]["expression"]
    terms = re.findall(r"([+-]?)\s*(\d+)", expression)
    if re.sub(r"[\d\s+-]", "", expression) or len(terms) < 2:
        raise ValueError(f"worked solutions need a sum of whole numbers, got {expression!r}; allow only + and -")
    total = int(terms[0][0] + terms[0][1])
    lines = []
    for sign, digits in terms[1:]:
        before, total = total, total + int(sign + digits)
        lines.append(f"{before} {sign} {digits} = {total}")
    return "\n".join(lines)


_WRITERS = {"chain_sum": _running_totals, "basic_arithmetic": _running_totals}
