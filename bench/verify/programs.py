"""Every canonical solution of HumanEval and MBPP, and each with a small wrong change; and how fast short programs run.

    python bench/verify/programs.py DATA_FOLDER [--output bench/results/verify/code.md]

The wrong change leaves the solution as it is and changes what its function returns: a truth is turned, a number is a
tenth and one higher, a text or a list is one longer, anything else is None. All solutions must pass, all changed ones
must fail.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

from prime_trainer.config.sections import BenchConfig
from prime_trainer.evaluation import benchmarks
from prime_trainer.report import markdown
from prime_trainer.verify import sandbox
from prime_trainer.verify.answers import AssertTests, StdioTests
from prime_trainer.verify.programs import CodeRunner
from prime_trainer.verify.sandbox import Confinement, Limits

CHANGE = """

_right = {name}
def {name}(*args):
    value = _right(*args)
    if value is None or isinstance(value, (bool, complex)) or type(value).__name__ in ("Match", "Pattern"):
        return not value
    if isinstance(value, (int, float)):
        return value + 1 + abs(value) // 10
    if isinstance(value, (str, bytes)):
        return value + type(value)("x" if isinstance(value, str) else b"x")
    if isinstance(value, (list, tuple)):
        return type(value)([*value, "wrong"])
    if isinstance(value, (set, frozenset)):
        return value | {{"wrong"}}
    if isinstance(value, dict):
        return {{**value, "wrong": "wrong"}}
    return None
"""
SHORT = "a, b = map(int, input().split())\nprint(a + b)\n"


def canonical(data: Path) -> dict[str, list[tuple[AssertTests, str]]]:
    """`(answer, program)` of every item of both benchmarks."""
    with gzip.open(data / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        human = [json.loads(line)["canonical_solution"] for line in lines]
    mbpp = [row["code"] for row in json.loads((data / "mbpp.json").read_text(encoding="utf-8"))]
    cfg = BenchConfig(data=data)
    return {
        name: [(p.answer, program) for p, program in zip(benchmarks.load(name, cfg), programs, strict=True)]
        for name, programs in (("humaneval", human), ("mbpp", mbpp))
    }


def changed(answer: AssertTests, program: str) -> str:
    """The program with its tested function wrong."""
    return answer.prelude + program + "".join(CHANGE.format(name=name) for name in answer.names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="every n-th program alone")
    args = parser.parse_args()
    solutions, rows, odd = canonical(args.data), [], []
    for kind in sandbox.KINDS:
        reason = sandbox.obstacle(kind)
        if reason is not None:
            print(f"{kind}: {reason}")
            continue
        runner = CodeRunner(Confinement(kind), Limits(seconds=60.0), args.workers)
        for name, jobs in solutions.items():
            jobs = jobs[:: args.every]
            for case, wanted in (("as it is", 1.0), ("wrong", 0.0)):
                begin = time.perf_counter()
                programs = [program if case == "as it is" else changed(answer, program) for answer, program in jobs]
                futures = [runner.submit(answer, text) for (answer, _), text in zip(jobs, programs, strict=True)]
                scores = [future.result().score for future in futures]
                odd += [f"{kind}, {name}/{i}, {case}: score {s:g}" for i, s in enumerate(scores) if s != wanted]
                rows.append({
                    "sandbox": kind, "programs": f"{benchmarks.BENCHMARKS[name].title}, {case}", "count": len(jobs),
                    "passed": f"{sum(scores):g}", "seconds": f"{time.perf_counter() - begin:.1f}",
                })  # fmt: skip
        runner.close()
        runner = CodeRunner(Confinement(kind), Limits(), 8)
        answer = StdioTests(["1 2\n", "3 4\n"], ["3\n", "7\n"])
        short = -(-200 // args.every)
        begin = time.perf_counter()
        scores = [future.result().score for future in [runner.submit(answer, SHORT) for _ in range(short)]]
        rows.append({
            "sandbox": kind, "programs": "short, two inputs, 8 at once", "count": short, "passed": f"{sum(scores):g}",
            "seconds": f"{time.perf_counter() - begin:.1f}",
        })  # fmt: skip
        runner.close()
    report = (
        f"Programs of which all that are as they are should pass, and none that is wrong.\n\n{markdown.table(rows)}"
    )
    report += "".join(f"\n- {line}" for line in odd) + "\n" if odd else ""
    if args.output:
        args.output.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
