import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.verify.math_answers import cases
from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.verify import Verdict, Verifier, last_boxed
from prime_trainer.verify.answer_scorers import _settle
from prime_trainer.verify.answers import GymAnswer, MathAnswer, from_json
from prime_trainer.verify.extract import WINDOW, last_answer
from prime_trainer.verify.mathematics.judge import right
from prime_trainer.verify.verifier import _settled

SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", Path(__file__).resolve().parents[4] / "shared"))
RIGHT, WRONG = Verdict(1.0, None), Verdict(0.0, None)


def math(answer):
    return MathAnswer(answer)


def box(text):
    return f"so it is \\boxed{{{text}}}."


@pytest.fixture(scope="module")
def verifier():
    with Verifier(seconds=5.0, workers=1) as verifier:
        yield verifier


@given(st.lists(st.tuples(st.integers(-120, 120), st.integers(-120, 120)), min_size=1, max_size=8))
def test_whole_numbers_need_no_process(pairs):
    """Verdicts by their digits are those of the judge."""
    with Verifier(seconds=5.0, workers=1) as verifier:
        got = verifier.score([(math(str(a)), box(b)) for a, b in [*pairs, (10**18 - 1, 10**18 - 1)]])
        assert verifier._pool.pid is None
    assert [verdict.score for verdict in got] == [*(float(right(math(str(a)), str(b))) for a, b in pairs), 1.0]


@pytest.mark.parametrize("text", ["007", "7.0", "+7", "7 ", "10" * 10])
def test_other_ways_of_writing_a_number_are_read(verifier, text):
    assert verifier.score([(math(text.strip()), box(text))]) == [RIGHT]
    assert _settled(math("7"), text) is None


def test_a_tolerance_is_not_settled_by_digits(verifier):
    assert verifier.score([(MathAnswer("7", tolerance=2.0), box(8))]) == [RIGHT]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no box", None),
        (r"\boxed{4}", "4"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3} m}", r"\boxed{3} m"),
        (r"} } \boxed{5} }", "5"),
        (r"\boxed{6} and \boxed{7", "6"),
        (r"\boxed{8", None),
        (r"\boxed{}", ""),
        ("{" * 9 + r"\boxed{9}", "9"),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@given(st.text(alphabet="{}\\ab", max_size=40), st.text(alphabet="ab", max_size=5))
def test_a_box_at_the_end_is_found_behind_any_text(before, content):
    # A backslash before the box would make it a line break and a word.
    assert last_boxed(before.rstrip("\\") + f" \\boxed{{{content}}}") == content


@pytest.mark.parametrize("text", ["{" * 10**7, r"\boxed{" * 1_500_000, r"\boxed{" + "{}" * 5_000_000, "}" * 10**7])
def test_last_boxed_is_quick_on_ten_megabytes(text):
    begin = time.process_time()  # a busy machine does not make it slower
    assert last_boxed(text) is None
    assert time.process_time() - begin < 1.0
    assert last_boxed(text[-WINDOW:]) is None


@pytest.mark.parametrize(
    ("gold", "text", "verdict"),
    [
        ("\\frac{1}{2}", "0.5", RIGHT),
        ("\\frac{\\sqrt{2}}{2}", "\\frac{1}{\\sqrt{2}}", RIGHT),
        ("1000", "1,000", RIGHT),
        ("x+1", "1 + x", RIGHT),
        ("(1, 2)", "(1,2)", RIGHT),
        ("\\text{Evelyn}", "\\text{Evelyn}", RIGHT),
        ("5", "15", WRONG),
        ("5", "-5", WRONG),
        ("(1, 2)", "(2, 1)", WRONG),
        ("5", "", WRONG),
        ("52_8", "52_{8}", RIGHT),
        ("52_8", "52_9", WRONG),
        ("52_8", "52", RIGHT),
    ],
)
def test_math(verifier, gold, text, verdict):
    assert verifier.score([(math(gold), box(text))]) == [verdict]


@pytest.mark.parametrize(
    ("text", "verdict"),
    [("4.2", RIGHT), ("4.1", RIGHT), ("4.3\\%", RIGHT), ("4.31", WRONG), ("x", WRONG), ("-4.2", WRONG)],
)
def test_a_tolerance_holds_for_numbers(verifier, text, verdict):
    assert verifier.score([(MathAnswer("4.2", tolerance=0.1), box(text))]) == [verdict]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("no answer", None),
        ("the answer is 1,234.", "1,234"),
        ("first 3, then $x = \\frac{1}{2}$.", "\\frac{1}{2}"),
        ("\\(7\\) or \\[ -8 \\]", "-8"),
        ("about 3.5%", "3.5%"),
        ("$" * 10**6, None),
    ],
)
def test_last_answer(text, answer):
    assert last_answer(text) == answer


def test_any_answer_is_an_option_and_a_box_wins(verifier):
    items = [(math("5"), "so x = 5"), (math("5"), "\\boxed{5} and not 6"), (math("5"), "nothing")]
    assert verifier.score(items) == [WRONG, RIGHT, WRONG]
    with Verifier(seconds=5.0, workers=1, any_answer=True) as lenient:
        assert lenient.score(items) == [RIGHT, RIGHT, WRONG]


def test_answers_are_grouped_by_equivalence(verifier):
    problems = [["1/2", "0.5", None, "2", "\\frac{1}{2}", "2.0"], [], [None], ["x+1", "1+x", "x"]]
    assert verifier.group(problems) == [[0, 0, None, 1, 0, 1], [], [None], [0, 0, 1]]


def test_a_response_without_a_box_is_wrong_and_no_failure(verifier):
    assert verifier.score([(math("5"), "the answer is 5"), (math("5"), "\\boxed{5")]) == [WRONG, WRONG]


def test_reference_answers_of_the_benchmarks_are_right_and_wrong_ones_are_not(verifier):
    """Every 25th item; bench/verify/math_answers.py judges them all."""
    if not (SHARED / "data" / "math500.jsonl").is_file():
        pytest.skip(f"no {SHARED / 'data'}: the benchmark files are not here")
    jobs = cases(SHARED / "data", every=25)
    verdicts = verifier.score([(problem.answer, box(text)) for _, _, problem, text in jobs])
    wrong = [
        (category, problem.reference, text)
        for (_, category, problem, text), verdict in zip(jobs, verdicts, strict=True)
        if verdict.score != (category in ("itself", "rewritten"))
    ]
    assert len(jobs) > 200 and len(wrong) <= 0.01 * len(jobs), wrong
    assert not [case for case in wrong if case[0] == "itself"]


@pytest.mark.parametrize("name", ["chain_sum", "arc_agi", "countdown", "knights_knaves", "word_ladder", "mini_sudoku"])
def test_reference_answers_of_reasoning_gym_score_one_after_json(verifier, name):
    problems = load_task(TaskConfig(name=name, eval_size=3), 0).train(0, 3)
    items = [
        (from_json(json.loads(json.dumps(problem.answer.to_json()))), box(problem.reference)) for problem in problems
    ]
    assert verifier.score(items) == [RIGHT] * 3
    assert [v.score for v in verifier.score([(problem.answer, box("nothing")) for problem in problems])] == [0.0] * 3


def test_reasoning_gym_wrappers_are_removed_and_containing_the_answer_is_no_credit(verifier):
    (problem,) = load_task(TaskConfig(eval_size=1), 0).train(0, 1)
    right = problem.reference
    texts = [f" {right} ", f"\\text{{{right}}}", f"${right}$", f"1{right}", f"{right} or 7"]
    verdicts = verifier.score([(problem.answer, box(text)) for text in texts])
    assert verdicts == [RIGHT, RIGHT, RIGHT, WRONG, WRONG]


@pytest.mark.parametrize(
    ("raw", "text", "oracle", "score"),
    [
        (1.0, "5", "5", 1.0),
        (1.0, "5.0", "5", 1.0),
        (7.0, "5", "5", 1.0),
        (0.5, "15", "5", 0.0),
        (0.5, "1 2", "1 3", 0.5),
        (0.05, "x", "5", 0.0),
        (float("nan"), "x", "5", 0.0),
        (-1.0, "x", "5", 0.0),
    ],
)
def test_which_partial_credit_counts(raw, text, oracle, score):
    assert _settle(raw, text, oracle) == score


def countdown():
    (problem,) = load_task(TaskConfig(name="countdown", eval_size=1), 0).train(0, 1)
    return problem


def test_text_that_is_evaluated_reaches_nothing(verifier, tmp_path):
    problem, target = countdown(), tmp_path / "touched"
    texts = [
        f"__import__('os').system('touch {target}')",
        f"open('{target}', 'w')",
        f"__import__('pathlib').Path('{target}').touch()",
        f"__import__('subprocess').run(['touch', '{target}'])",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "open('/proc/self/environ').read()",
        "__import__('socket').socket()",
    ]
    verdicts = verifier.score([(problem.answer, box(text)) for text in texts])
    assert [verdict.score for verdict in verdicts] == [0.0] * len(texts)
    assert all(verdict.failure.startswith("refused: ") for verdict in verdicts)  # more in test_containment.py
    assert not target.exists()
    assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]


HOSTILE = {
    "tower": "9**9**9**9",
    "latex tower": "10^{10^{10^{10}}}",
    "fractions": "\\frac{1}{" * 900 + "1" + "}" * 900,
    "roots": "\\sqrt{" * 1000 + "2" + "}" * 1000,
    "deep fractions": "\\frac{1}{" * 1000 + "1" + "}" * 1000,
    "megabytes of braces": "{" * 5_000_000 + "}" * 5_000_000,
    "parentheses": "(" * 4900 + ")" * 4900,
    "digits": "9" * 9999,
    "factorial": "1000000!!",
    "surrogates": "\x00\ud800",
}


@pytest.fixture(scope="module")
def hasty():
    with Verifier(seconds=0.8, workers=1) as verifier:
        yield verifier


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_is_bounded_and_the_rest_of_the_batch_is_scored(hasty, text):
    problem = countdown()
    hasty.score([(math("5"), box("6")), (problem.answer, box(problem.reference))])
    begin = time.perf_counter()
    verdicts = hasty.score(
        [(math("5"), box(text)), (problem.answer, box(text)), (math("5"), box("5")), (math("1/2"), box("0.5"))]
    )
    seconds = time.perf_counter() - begin
    assert [verdict.score for verdict in verdicts] == [0.0, 0.0, 1.0, 1.0]
    assert seconds < 2 * 0.8 + 20  # two limits on a busy machine


def scoring_process(verifier):
    """The process whose children score: bubblewrap's innermost, where that confines."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int((entry / "stat").read_text().rpartition(")")[2].split()[1])] = int(entry.name)
            except OSError:  # it ended
                continue
    pid = verifier._pool.pid
    while pid in parents:
        pid = parents[pid]
    return pid


ENDLESS = "9**9**9**9"


def test_time_limit_memory_limit_and_length_are_failures():
    problem = countdown()
    with Verifier(seconds=0.8, workers=1) as verifier:
        texts = [ENDLESS, "9" * 10_001, "[" * 5, problem.reference]
        verdicts = verifier.score([(problem.answer, box(text)) for text in texts])
        assert verdicts == [Verdict(0.0, "time limit"), Verdict(0.0, "too long"), WRONG, RIGHT]
        limits = Path(f"/proc/{scoring_process(verifier)}/limits").read_text()
    assert f"{2 << 30}" in next(line for line in limits.splitlines() if line.startswith("Max address space"))


def test_a_process_killed_in_the_middle_is_replaced_and_costs_nothing():
    problem = countdown()
    with Verifier(seconds=2.0, workers=1) as verifier:
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]
        threading.Timer(0.5, os.kill, [scoring_process(verifier), signal.SIGKILL]).start()
        verdicts = verifier.score([(problem.answer, box(t)) for t in (ENDLESS, problem.reference)])
        assert verdicts == [Verdict(0.0, "time limit"), RIGHT]
        # One that dies between two batches is replaced, too.
        os.kill(scoring_process(verifier), signal.SIGKILL)
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]


def test_an_answer_whose_process_dies_again_and_again_is_a_failure():
    problem, done, killed = countdown(), threading.Event(), set()
    with Verifier(seconds=60.0, workers=1) as verifier:
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]

        def kill():
            while not done.wait(0.2):
                # Once it has children, it scores.
                pid = verifier._pool.pid
                if pid is not None and pid not in killed and _spends(scoring_process(verifier)):
                    killed.add(pid)
                    os.kill(pid, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        try:
            assert verifier.score([(problem.answer, box(ENDLESS))]) == [Verdict(0.0, "worker died")]
        finally:
            done.set()
            killer.join()
        assert len(killed) == 3
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]


def _spends(pid):
    """Whether a process is a child that scores: it has the processor-time limit that only those have."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
    except OSError:
        return False
    return next(line for line in limits if line.startswith("Max cpu time")).split()[3] == "61"


def test_a_stopped_process_does_not_stop_the_trainer():
    big = math("5" + " " * 300_000)  # more than a pipe holds
    with Verifier(seconds=1.0, workers=1) as verifier:
        assert verifier.score([(big, box("5"))]) == [RIGHT]
        os.kill(scoring_process(verifier), signal.SIGSTOP)
        assert verifier.score([(big, box("5.0")), (big, box("6"))]) == [RIGHT, WRONG]


def test_the_process_ignores_ctrl_c_and_score_forgets_what_was_in_flight():
    problem = countdown()
    with Verifier(seconds=30.0, workers=1) as verifier:
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]
        pid, inner = verifier._pool.pid, scoring_process(verifier)
        os.kill(inner, signal.SIGINT)
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]
        assert (verifier._pool.pid, scoring_process(verifier)) == (pid, inner)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            verifier.score([(problem.answer, box(ENDLESS))])
        assert verifier._pool.pid is None and not _runs(pid)
        deadline = time.monotonic() + 10
        while _runs(inner) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not _runs(inner)
        assert verifier.score([(problem.answer, box(problem.reference))]) == [RIGHT]


def test_many_easy_answers_take_seconds_and_keep_their_order():
    with Verifier(seconds=5.0, workers=2) as verifier:
        begin = time.perf_counter()
        verdicts = verifier.score([(math(str(i)), box(f"{i}.0" if i % 3 else "-6")) for i in range(150)] * 2)
        assert time.perf_counter() - begin < 60  # on a busy machine; figures are in bench/
    assert [verdict.score for verdict in verdicts] == [float(bool(i % 3)) for i in range(150)] * 2


PARENT = """
import json, sys
from prime_trainer.verify import Verifier
from prime_trainer.verify.answers import MathAnswer
with Verifier(5.0, 1) as verifier:
    print(verifier.score([(MathAnswer("1/2"), "\\\\boxed{0.5}")])[0].score)
    pid = verifier._pool.pid
    while children := open(f"/proc/{pid}/task/{pid}/children").read().split():
        pid = int(children[0])
    maps = open(f"/proc/{pid}/maps").read()
    print([m for m in ("math_verify", "sympy", "reasoning_gym", "torch", "transformers") if m in sys.modules])
    print("torch" in maps)
    if sys.argv[1:]:
        print(pid, flush=True)
        import os; os._exit(0)
"""


def test_the_trainer_imports_no_scorer_and_the_worker_no_torch():
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["1.0", "[]", "False"]


def test_workers_end_with_their_trainer():
    done = subprocess.run([sys.executable, "-c", PARENT, "die"], capture_output=True, text=True, check=True)
    pid = int(done.stdout.splitlines()[-1])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _runs(pid):
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_scorer_that_cannot_load_is_an_error_not_a_zero(verifier):
    with pytest.raises(RuntimeError, match=r"cannot score .*no_such.*not registered"):
        verifier.score([(GymAnswer("no_such", {}), box("5"))])
    with pytest.raises(ValueError, match="seconds must be positive"):
        Verifier(0.0, 1)
    assert verifier.score([(math("5"), box("5"))]) == [RIGHT]
