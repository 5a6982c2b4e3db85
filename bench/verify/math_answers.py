"""Every reference answer of the mathematics benchmarks against itself and against wrong ones; writes a Markdown table.

    python -m bench.verify.math_answers DATA_FOLDER [--output bench/results/verify/math.md]

Each reference answer is scored, in a box: as it stands; written in another way (other spacing, `\\dfrac`, a sentence
around it), so that the comparison itself is used; plus one (numbers and formulas); and the answer of the item before it
where that is written differently. Then both in every form of `forms.FORMS` that applies.
"""

import argparse
import collections
import re
import time
from pathlib import Path

from bench.verify.forms import FORMS, written
from prime_trainer.config.sections import BenchConfig
from prime_trainer.data.problems import Problem
from prime_trainer.evaluation import benchmarks
from prime_trainer.report import markdown
from prime_trainer.verify import Verifier
from prime_trainer.verify.extract import plain

MATH = [name for name, benchmark in benchmarks.BENCHMARKS.items() if benchmark.ability == "math"]
CATEGORIES = ("itself", "rewritten", "plus one", "neighbour's")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def rewritten(answer: str) -> str:
    """The same answer in another hand."""
    return answer.replace("\\frac", "\\dfrac").replace(",", " , ").replace("+", " + ").strip("$") + "\\,"


def plus_one(answer: str) -> str | None:
    """The answer with its last number one higher; None where it has no number."""
    found = list(NUMBER.finditer(answer))
    if not found:
        return None
    number = found[-1]
    value = float(number[0]) + 1
    text = str(int(value)) if value.is_integer() and "." not in number[0] else repr(value)
    return answer[: number.start()] + text + answer[number.end() :]


def cases(data: Path, every: int = 1) -> list[tuple[str, str, Problem, str]]:
    """`(benchmark, category, problem, answer to judge)`, of every n-th problem."""
    jobs = []
    for name in MATH:
        problems = benchmarks.load(name, BenchConfig(data=data))
        for i, problem in list(enumerate(problems))[::every]:
            answer, before = problem.reference, problems[i - 1].reference
            variants = [answer, rewritten(answer), plus_one(answer), before if plain(before) != plain(answer) else None]
            jobs += [(name, c, problem, v) for c, v in zip(CATEGORIES, variants, strict=True) if v is not None]
    return jobs


def form_cases(data: Path, every: int = 1, first: int = 0) -> list[tuple[str, bool, Problem, str]]:
    """`(form, whether it is right, problem, answer to judge)`: the reference and its neighbour's in every form."""
    jobs = []
    for name in MATH:
        problems = benchmarks.load(name, BenchConfig(data=data))
        for i, problem in list(enumerate(problems))[first::every]:
            before = problems[i - 1].reference
            jobs += [(form, True, problem, text) for form, text in written(problem.reference).items()]
            if plain(before) != plain(problem.reference):
                jobs += [(form, False, problem, text) for form, text in written(before).items()]
    return jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--every", type=int, default=1, help="every n-th item alone")
    args = parser.parse_args()
    jobs = cases(args.data, args.every)
    with Verifier(seconds=5.0, workers=2) as verifier:
        verifier.score([(jobs[0][2].answer, "\\boxed{x}"), (jobs[0][2].answer, "\\boxed{y}")])
        begin = time.perf_counter()
        verdicts = verifier.score([(problem.answer, f"so \\boxed{{{text}}}.") for _, _, problem, text in jobs])
        seconds = time.perf_counter() - begin
        forms = form_cases(args.data, args.every)
        begin = time.perf_counter()
        judged = verifier.score([(problem.answer, f"so \\boxed{{{text}}}.") for _, _, problem, text in forms])
        form_seconds = time.perf_counter() - begin
    report = render(jobs, verdicts, seconds) + render_forms(forms, judged, form_seconds)
    if args.output:
        args.output.write_text(report, encoding="utf-8")
    print(report)


def render(jobs, verdicts, seconds: float) -> str:
    counts, odd = collections.Counter(), []
    for (name, category, problem, text), verdict in zip(jobs, verdicts, strict=True):
        right = verdict.score == (category in CATEGORIES[:2])
        counts[name, category, "items"] += 1
        counts[name, category, "right"] += right
        if not right:
            odd.append(
                (name, category, problem.id, problem.reference, text, verdict.failure or f"score {verdict.score:g}")
            )
    cells = []
    for name in [*MATH, None]:
        row = {"benchmark": benchmarks.BENCHMARKS[name].title if name else "all"}
        for c in CATEGORIES:
            n, k = (sum(counts[m, c, what] for m in ([name] if name else MATH)) for what in ("items", "right"))
            row[c] = f"{k} of {n} ({100 * k / max(1, n):.2f} %)"
        cells.append(row)
    others = [{"item": i, "case": c, "reference": r, "answer": t, "verdict": v} for _, c, i, r, t, v in odd]
    rate = 60 * len(jobs) / seconds
    return (
        "Answers judged as they should be: in the first two columns accepted, in the others rejected.\n\n"
        f"{markdown.table(cells)}\n{len(jobs)} answers in {seconds:.1f} s with two workers: {rate:.0f} a minute.\n"
        + (f"\nThe others:\n\n{markdown.table(others)}" if others else "")
    )


def render_forms(jobs, verdicts, seconds: float) -> str:
    counts, odd = collections.Counter(), []
    for (form, right, problem, text), verdict in zip(jobs, verdicts, strict=True):
        counts[form, right, "items"] += 1
        counts[form, right, "judged so"] += verdict.score == right
        if verdict.score != right:
            said = verdict.failure or f"score {verdict.score:g}"
            odd.append({
                "item": problem.id, "form": form, "reference": problem.reference, "answer": text,
                "verdict": said,
            })  # fmt: skip
    rows = []
    for form in [*FORMS, None]:
        row = {"form": form or "all"}
        for title, right in (("accepted", True), ("neighbour's refused", False)):
            names = [form] if form else list(FORMS)
            n, k = (sum(counts[f, right, what] for f in names) for what in ("items", "judged so"))
            row[title] = f"{k} of {n}"
        rows.append(row)
    return (
        "\nEvery reference in every form that applies to it (accepted), and the answer of the item before in the same "
        f"forms (refused).\n\n{markdown.table(rows)}\n{len(jobs)} answers in {seconds:.1f} s with two workers: "
        f"{60 * len(jobs) / seconds:.0f} a minute.\n" + (f"\nThe others:\n\n{markdown.table(odd)}" if odd else "")
    )


if __name__ == "__main__":
    main()
