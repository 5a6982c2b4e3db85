"""The benchmarks of the model cards: how many items each has, and how a row of its files becomes a problem.

Files are the user's: a file in the forms named below, or a folder of a Hugging Face dataset (parquet or JSONL).
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..config.sections import BenchConfig, BenchmarkName
from ..data import chat
from ..data.file_task import reference_text
from ..data.problems import Problem
from ..data.readers import KINDS, Kind, kind_of, read_rows
from ..verify import last_boxed
from ..verify.answers import Answer, AssertTests, MathAnswer

SUFFIXES = {
    "math": "\n\nPresent the answer in LaTex format: \\boxed{Your answer}",
    "code": "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end.",
}
"""What the cards of Eurus-2 append to a question."""

PUBLISHED: dict[str, dict[BenchmarkName, float]] = {
    "Eurus-2-7B-SFT": {"aime24": 3.3, "math500": 65.1, "amc": 30.1, "minerva": 32.7, "olympiad": 29.8},
    "Eurus-2-7B-PRIME": {"aime24": 26.7, "math500": 79.2, "amc": 57.8, "minerva": 38.6, "olympiad": 42.1},
}
"""Greedy accuracy in %, from the cards."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """`read` gives the question and the answer of a row, or None for one that is not part of the benchmark."""

    title: str
    ability: Literal["math", "code"]
    items: int
    files: tuple[str, ...]
    read: Callable[[Row], tuple[str, Answer] | None]


def load(name: BenchmarkName, cfg: BenchConfig) -> list[Problem]:
    """Returns the first `cfg.limit` problems (0: all) of a benchmark.

    Raises ValueError, naming the file, the row and the field or the number of items, for what is not as expected.
    """
    benchmark = BENCHMARKS[name]
    problems: list[Problem] = []
    for path in _locate(name, benchmark, cfg):
        for place, row in read_rows(path, "bench.data", _kind(path)):
            try:
                found = benchmark.read(row)
            except ValueError as error:
                raise ValueError(f"{path}, {place}: {error}") from None
            if found is not None:
                question, answer = found
                messages = chat.asking(question + SUFFIXES[benchmark.ability], cfg.system_prompt)
                problems.append(Problem(f"{name}/{len(problems)}", messages, answer))
    if len(problems) != benchmark.items:
        raise ValueError(f"{path}: {benchmark.title} has {benchmark.items} items, found {len(problems)}")
    return problems[: cfg.limit or None]


def _locate(name: BenchmarkName, benchmark: Benchmark, cfg: BenchConfig) -> list[Path]:
    if name in cfg.paths:
        places = [cfg.paths[name]]
    elif cfg.data is not None:
        places = [cfg.data / file for file in (*benchmark.files, name)]
    else:
        places = []
    for place in places:
        if place.is_file():
            return [place]
        if place.is_dir():
            return _dataset_files(place)
    looked = f"; looked for {', '.join(map(str, places))}" if places else ""
    raise ValueError(f"no file of {benchmark.title}: set bench.data or bench.paths.{name}{looked}")


def _dataset_files(folder: Path) -> list[Path]:
    """The files of the split `test`, or all of them where none is named so."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and kind_of(p))
    tests = [p for p in files if "test" in p.name or "test" in p.parent.name]
    if not files:
        raise ValueError(f"{folder} has no parquet, JSONL or JSON files")
    return tests or files


def _kind(path: Path) -> Kind:
    kind = kind_of(path)
    if kind is None:
        raise ValueError(f"{path}: a benchmark file must end with {', '.join(KINDS)}")
    return kind


def _field(row: Row, *names: str) -> Any:
    """The first of the fields that the row has, whatever its case; ValueError names them all where it has none."""
    lower = {key.lower(): value for key, value in row.items()}
    for name in names:
        if lower.get(name) is not None:
            return lower[name]
    raise ValueError(f"a row must have {' or '.join(names)}, got {', '.join(row) or 'nothing'}")


def _text(row: Row, *names: str) -> str:
    value = _field(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{' or '.join(names)} must be text, got {value!r:.100}")
    return value


def _math(row: Row) -> tuple[str, Answer]:
    answer = reference_text(_field(row, "answer"), "answer")
    return _text(row, "question", "problem"), MathAnswer(answer)


def _aime24(row: Row) -> tuple[str, Answer] | None:
    # The files of PRIME hold three years in one; others hold 2024 alone.
    return _math(row) if "2024" in str(row.get("url", row.get("year", "2024"))) else None


def _minerva(row: Row) -> tuple[str, Answer]:
    if "answer" in row:
        return _math(row)
    boxed = last_boxed(_text(row, "solution"))
    if boxed is None:
        raise ValueError("solution must end with \\boxed{..}")
    return _text(row, "problem", "question"), MathAnswer(boxed)


def _olympiad(row: Row) -> tuple[str, Answer]:
    answers = _field(row, "final_answer", "answer")
    if isinstance(answers, str):
        answers = [answers]
    if not isinstance(answers, list) or len(answers) != 1:
        raise ValueError(f"final_answer must be a list of one answer, got {answers!r:.100}")
    tolerance = _tolerance(row["error"]) if row.get("error") else None
    answer = MathAnswer(reference_text(answers[0], "final_answer"), tolerance)
    context = row.get("context")
    return (f"{context}\n" if context else "") + _text(row, "question"), answer


def _tolerance(error: Any) -> float:
    try:
        tolerance = float(error)
    except (TypeError, ValueError):
        raise ValueError(f"error must be a number, got {error!r:.40}") from None
    if not 0 <= tolerance < math.inf:  # NaN neither
        raise ValueError(f"error must be a finite number of at least 0, got {error!r:.40}")
    return tolerance


def _humaneval(row: Row) -> tuple[str, Answer]:
    prompt, entry = _text(row, "prompt"), _text(row, "entry_point")
    tests = [f"{_text(row, 'test')}\ncheck({entry})\n"]
    return prompt, AssertTests(tests, setup=prompt, names=[entry], prelude=prompt)


def _mbpp(row: Row) -> tuple[str, Answer]:
    tests = _field(row, "test_list")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError(f"test_list must be a list of assertions, got {tests!r:.100}")
    code = _text(row, "code")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in the benchmark's own strings
            reference = ast.parse(code).body
            used = {node.id for test in tests for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)}
    except SyntaxError as error:
        raise ValueError(f"code and test_list must be Python: {error}") from None
    # Some tests use what the reference solution imports.
    imports = [ast.unparse(node) for node in reference if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined = {node.name for node in reference if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names = sorted(used & defined)
    if not names:
        raise ValueError(f"test_list must call a function that code defines, got {tests[0]!r:.100}")
    setup = "\n".join([*(row.get("test_imports") or row.get("test_setup_code", "").splitlines()), *imports])
    # The first test shows the name and the arguments.
    return f"{_text(row, 'prompt', 'text')}\n{tests[0]}", AssertTests(tests, setup=setup, names=names, prelude="")


BENCHMARKS: dict[BenchmarkName, Benchmark] = {
    "aime24": Benchmark("AIME 2024", "math", 30, ("aime24.jsonl", "aime_2022_2024.jsonl"), _aime24),
    "math500": Benchmark("MATH-500", "math", 500, ("math500.jsonl",), _math),
    "amc": Benchmark("AMC", "math", 83, ("amc.jsonl",), _math),
    "minerva": Benchmark("Minerva Math", "math", 272, ("minerva_math.jsonl",), _minerva),
    "olympiad": Benchmark("OlympiadBench", "math", 675, ("olympiadbench.jsonl",), _olympiad),
    "humaneval": Benchmark("HumanEval", "code", 164, ("HumanEval.jsonl.gz", "HumanEval.jsonl"), _humaneval),
    "mbpp": Benchmark("MBPP", "code", 399, ("mbpp.json", "mbpp.jsonl"), _mbpp),
}
"""In the order of the cards' table."""


def wanted(cfg: BenchConfig) -> Iterator[BenchmarkName]:
    """The names of the benchmarks that a configuration asks for, in the cards' order."""
    return (name for name in BENCHMARKS if name in cfg.tasks)
