"""How fast answers are scored; writes a Markdown table.

    python -m bench.verify.rates DATA_FOLDER [--output bench/results/verify/rates.md] [--answers 6000] [--workers 2]

Three batches. Formulas: references of the mathematics benchmarks that are no plain numbers, each against other
references, no two pairs alike, so that every answer is parsed. reasoning-gym: answers of four of its datasets, half of
them right; two of these scorers evaluate the answer. Hanging: 512 answers of countdown, a tenth of which ask its scorer
for a power tower that no time limit inside the scorer ends.
"""

import argparse
import time
from pathlib import Path

from bench.verify.math_answers import MATH
from prime_trainer.config.sections import BenchConfig, TaskConfig
from prime_trainer.data.reasoning_gym import ReasoningGymTask
from prime_trainer.evaluation import benchmarks
from prime_trainer.report import markdown
from prime_trainer.verify import TIME_LIMIT, Verifier
from prime_trainer.verify.answers import GymAnswer, MathAnswer

DATASETS = ("chain_sum", "countdown", "polynomial_multiplication", "letter_counting")
HANGING = 512
Job = tuple[MathAnswer | GymAnswer, str]


def formulas(data: Path, count: int) -> list[Job]:
    """Pairs of references that hold a command, a power or a sum."""
    found = [p for name in MATH for p in benchmarks.load(name, BenchConfig(data=data))]
    found = [p for p in found if any(mark in p.reference for mark in "\\^+")]
    pairs = ((found[i], found[(i + shift) % len(found)]) for shift in range(len(found)) for i in range(len(found)))
    return [(p.answer, f"so \\boxed{{{q.reference}}}.") for (p, q), _ in zip(pairs, range(count), strict=False)]


def gym(count: int) -> list[Job]:
    """Right and wrong answers in turn."""
    jobs: list[Job] = []
    for name in DATASETS:
        task = ReasoningGymTask(TaskConfig(name=name, eval_size=2), seed=0)
        problems = task.train(0, -(-count // len(DATASETS)))
        said = [p.answer.reference for p in problems]
        jobs += [
            (p.answer, f"so \\boxed{{{said[i] if i % 2 else said[i - 1]}}}, the answer of {i}")
            for i, p in enumerate(problems)
        ]
    return jobs[:count]


def hanging(count: int) -> list[Job]:
    """Every tenth answer is a tower of powers, no two alike."""
    task = ReasoningGymTask(TaskConfig(name="countdown", eval_size=2), seed=0)
    return [
        (p.answer, f"so \\boxed{{{f'9**9**9**{i + 9}' if i % 10 == 0 else p.answer.reference}}}")
        for i, p in enumerate(task.train(0, count))
    ]


def measure(title: str, jobs: list[Job], workers: int) -> dict[str, object]:
    """A row of the table; the workers are warm when the clock starts."""
    with Verifier(seconds=5.0, workers=workers) as verifier:
        verifier.score([(jobs[-1][0], "\\boxed{x}"), (jobs[-2][0], "\\boxed{y}")])
        begin = time.perf_counter()
        verdicts = verifier.score(jobs)
        seconds = time.perf_counter() - begin
    return {
        "answers": title,
        "count": len(jobs),
        "right": sum(v.score == 1.0 for v in verdicts),
        "refused unread": sum(v.failure not in (None, TIME_LIMIT) for v in verdicts),
        "over the time limit": sum(v.failure == TIME_LIMIT for v in verdicts),
        "seconds": f"{seconds:.1f}",
        "a minute": round(60 * len(jobs) / seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--answers", type=int, default=6000, help="of the first two batches")
    parser.add_argument("--hanging", type=int, default=HANGING, help="of the last batch")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    rows = [
        measure("formulas, all different", formulas(args.data, args.answers), args.workers),
        measure("reasoning-gym", gym(args.answers), args.workers),
        measure("countdown, every tenth hangs", hanging(args.hanging), args.workers),
    ]
    report = f"Answers scored with {args.workers} workers and a limit of 5 seconds each.\n\n{markdown.table(rows)}"
    if args.output:
        args.output.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
