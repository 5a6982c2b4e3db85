"""Right and wrong programs of every form in every sandbox that works here."""

import os
from pathlib import Path

import pytest
from helpers.programs import asserts, calls, run, stdio

from bench.verify.programs import canonical, changed
from prime_trainer.verify import Verdict
from prime_trainer.verify.programs import CodeRunner
from prime_trainer.verify.sandbox import Limits

SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", Path(__file__).resolve().parents[4] / "shared"))

ADD = "a, b = map(int, input().split())\nprint(a + b)\n"


@pytest.mark.parametrize(
    ("program", "score"),
    [
        (ADD, 1.0),
        (ADD + "exit()", 1.0),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", 1.0),
        ("import os\nos.write(1, str(sum(map(int, os.read(0, 99).split()))).encode())", 1.0),
        ("def main():\n    " + ADD.replace("\n", "\n    ") + "\nif __name__ == '__main__':\n    main()", 1.0),
        ("import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
         "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n"
         "def main():\n    assert f(20000) == 20000\n    print(sum(map(int, input().split())))\n"
         "threading.Thread(target=main).start()", 1.0),
        ("import numpy as np\nprint(int(np.array(input().split(), int).sum()))", 1.0),
        ("from collections import *\nimport heapq, bisect, math, itertools, functools, re, decimal\n" + ADD, 1.0),
        ("open('/tmp/x', 'w').write(input()) if False else None\n" + ADD, 1.0),
        (ADD + "exit(3)", 0.0),
        (ADD + "1 / 0", 0.0),
        ("print(5)", 0.0),
        ("print('5\\n\\n\\n')", 0.0),
        ("def f(:", 0.0),
        ("", 0.0),
    ],
)  # fmt: skip
def test_programs_that_read_and_write(sandbox, program, score):
    verdicts = run(sandbox, [(stdio(["2 3\n", "4 5"], ["5\n", "9"]), program)], limits=Limits(20.0))
    assert verdicts == [Verdict(score, None)]


@pytest.mark.parametrize(
    ("program", "score"),
    [
        ("def add(a, b):\n    return a + b", 1.0),
        ("class Solution:\n    def add(self, a, b):\n        print('noise')\n        return a + b", 1.0),
        ("add = lambda a, b: a + b + 0.0", 1.0),
        ("def add(a, b):\n    return a + b if a else 8", 0.0),
        ("def add(a):\n    return 5", 0.0),
        ("def sub(a, b):\n    return a + b", 0.0),
        ("exit(0)", 0.0),
    ],
)
def test_programs_whose_functions_are_called(sandbox, program, score):
    answer = calls("add", [[2, 3], [0, 9]], [5, [9]])
    assert run(sandbox, [(answer, program)], limits=Limits(20.0)) == [Verdict(score, None)]


@pytest.mark.parametrize(
    ("program", "answer", "score"),
    [
        # What the graders of public data import beforehand.
        ("def f(s: List[str]) -> int:\n    return Counter(s)['a'] + math.gcd(4, 6)",
         calls("f", [[["a", "b"]]], [3]), 1.0),
        ("def f(x):\n    return heapq.nsmallest(1, x)[0] + bisect_left(x, 2) + len(list(accumulate(x)))",
         calls("f", [[[1, 2]]], [4]), 1.0),
        ("import numpy\ndef f(x):\n    return int(np.sum(x))", calls("f", [[[1, 2]]], [3]), 1.0),
        ("def f(x):\n    return undefined_name", calls("f", [[1]], [1]), 0.0),
        # The runner's future annotations are not the program's.
        ("def f(x) -> 1:\n    return isinstance(f.__annotations__['return'], int)", calls("f", [[1]], [True]), 1.0),
        # Integers of any size; keys that JSON made text.
        ("def f(n):\n    return 10**n", calls("f", [[5000]], [10**5000]), 1.0),
        ("def f(n):\n    return 10**n + 1", calls("f", [[5000]], [10**5000]), 0.0),
        ("def f(n):\n    return n - 1", calls("f", [[10**5000]], [10**5000 - 1]), 1.0),
        ("print(10**5000)", stdio(["\n"], ["1" + "0" * 5000]), 1.0),
        ("def f(d):\n    return sum(d)", calls("f", [[{"1": 2, "3": 4}]], [4]), 1.0),
        ("def f(d):\n    return sorted(d)", calls("f", [[{"1": 2, "x": 4}]], [["1", "x"]]), 1.0),
        # Standard input is a file of known size.
        ("import os\nprint(int(os.read(0, os.fstat(0).st_size)) * 2)", stdio(["3\n"], ["6\n"]), 1.0),
        # Numbers.
        ("print(4 / 2)", stdio(["\n"], ["2\n"]), 1.0),
        ("print(2.5)", stdio(["\n"], ["2\n"]), 0.0),
        ("print(50000000000000001.0)", stdio(["\n"], ["50000000000000001\n"]), 0.0),
    ],
)  # fmt: skip
def test_what_a_program_may_rely_on(sandbox, program, answer, score):
    assert run(sandbox, [(answer, program)], limits=Limits(20.0)) == [Verdict(score, None)]


def test_the_first_program_that_compiles_is_scored(sandbox):
    runner = CodeRunner(sandbox, Limits(20.0), 1)
    try:
        answer = calls("f", [[1]], [1])
        assert runner.submit(answer, "6 apples", "def f(x):\n    return x").result() == Verdict(1.0, None)
        assert runner.submit(answer, "6 apples", "so f").result() == Verdict(0.0, None)
    finally:
        runner.close()


def test_numpy_is_imported_once_and_the_limit_counts_processor_time(sandbox):
    program = "import numpy as np\nprint(int(np.array([int(input())]).sum()))"
    answer = stdio([f"{i}\n" for i in range(60)], [f"{i}\n" for i in range(60)])
    assert run(sandbox, [(answer, program)] * 4, limits=Limits(4.0)) == [Verdict(1.0, None)] * 4
    busy = "import time\ninput()\nwhile time.process_time() < 0.5:\n    pass"
    assert run(sandbox, [(stdio(["\n"] * 9, [""] * 9), busy)], limits=Limits(2.0)) == [Verdict(0.0, "time limit")]


def test_all_tests_count_unless_partial_credit_is_wanted(sandbox):
    answers = [
        stdio([f"{i}\n" for i in range(12)], [f"{i}\n" if i < 11 else "x" for i in range(12)]),
        calls("f", [[i] for i in range(4)], [0, 1, 2, -1]),
        asserts(["assert f(1) == 1", "assert f(2) == 0", "assert f(3) == 3", "assert f(4) == 4"], ["f"]),
    ]
    program = "def f(x):\n    return x\nif __name__ == '__main__':\n    print(f(input()))"
    jobs = [(answer, program) for answer in answers]
    assert [v.score for v in run(sandbox, jobs, limits=Limits(20.0))] == [0.0, 0.0, 0.0]
    partial = run(sandbox, jobs, limits=Limits(20.0), partial_credit=True)
    assert [v.score for v in partial] == [11 / 12, 0.75, 0.75]


@pytest.mark.slow
def test_canonical_solutions_pass_and_wrong_ones_do_not(sandbox):
    """Every 16th program; bench/verify/programs.py runs them all."""
    if not (SHARED / "data" / "mbpp.json").is_file():
        pytest.skip(f"no {SHARED / 'data'}: the benchmark files are not here")
    for jobs in canonical(SHARED / "data").values():
        jobs = jobs[3::16]
        assert len(jobs) >= 10
        limits = Limits(seconds=60.0)
        assert run(sandbox, jobs, limits=limits) == [Verdict(1.0, None)] * len(jobs)
        wrong = run(sandbox, [(answer, changed(answer, program)) for answer, program in jobs], limits=limits)
        assert wrong == [Verdict(0.0, None)] * len(jobs)
