"""No answer changes the verdict of another or touches anything outside, whatever its scorer evaluates.

The answers of `helpers.hostile.answers` are tried twice: as they come, where no scorer runs them, and with every
barrier of the scoring process taken down, so that they do run, and its confinement is all that is left.
"""

import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path

import pytest
from helpers.hostile import answers as hostile

from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.verify import SandboxError, Verdict, Verifier, contained, sandbox, worker
from prime_trainer.verify.answers import GymAnswer, MathAnswer
from prime_trainer.verify.sandbox import Confinement, obstacle
from prime_trainer.verify.verifier import CodeOptions

RIGHT, WRONG = Verdict(1.0, None), Verdict(0.0, None)
# These take seconds to generate as they come.
PARAMS = {
    "knight_swap": {"min_nodes": 6, "max_nodes": 6, "min_pieces": 2, "max_pieces": 2, "impossible_ratio": 1.0},
    "quantum_lock": {"difficulty": 2},
    "futoshiki": {"min_board_size": 4, "max_board_size": 4},
    "zebra_puzzles": {"num_people": 2, "num_characteristics": 2},
}


@pytest.fixture(scope="module", params=sandbox.KINDS)
def confine(request):
    reason = obstacle(request.param)
    if reason is not None:
        pytest.skip(reason)
    return Confinement(request.param)


def verifier_in(confine, seconds=5.0):
    return Verifier(seconds, 2, code=CodeOptions(lambda: confine))


def box(text):
    return f"so \\boxed{{{text}}}"


def problem(name, count=1):
    return load_task(TaskConfig(name=name, params=PARAMS.get(name, {}), eval_size=1), 0).train(0, count)


@pytest.fixture
def places(tmp_path):
    """What the answers attack; it is looked at afterwards."""
    name = f"mark-{uuid.uuid4().hex}"
    secret = tmp_path / "secret"
    secret.write_text("secret")
    tmp_path.chmod(0o777)
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(str(tmp_path / "socket"))
    listeners[1].listen()
    for listener in listeners:
        listener.setblocking(False)
    before = processes()
    yield {
        "name": name, "target": tmp_path / name, "secret": secret, "trainer": os.getpid(),
        "port": listeners[0].getsockname()[1], "socket": tmp_path / "socket",
    }  # fmt: skip
    for listener in listeners:
        with pytest.raises(BlockingIOError):
            listener.accept()
        listener.close()
    assert sorted(os.listdir(tmp_path)) == ["secret", "socket"]
    folders = ("/tmp", "/dev/shm", "/var/tmp", "/", os.getcwd())
    assert not [folder for folder in folders if (Path(folder) / name).exists()]
    deadline = time.monotonic() + 5
    while (left := processes() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def processes():
    """This process's descendants, and what became nobody's."""
    found, parents = set(), {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_bytes().split(b"\0")[0]
            except OSError:
                continue
            parents[int(entry.name)] = int(parent)
            if state != "Z" and command.rpartition(b"/")[2] in (b"sleep", b"touch", b"sh"):
                found.add(int(entry.name))
    mine = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in mine} - mine:
        mine |= more
    return {pid for pid in found if pid in mine or parents[pid] == 1}


def test_what_evaluates_is_what_the_table_says():
    """Every scorer of reasoning-gym that could evaluate a text, by its source."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    found = set()
    for name, (cls, _) in DATASETS.items():
        source = Path(sys.modules[cls.__module__].__file__).read_text()
        begin = source.find("def score_answer")
        body = source[begin : source.find("\nclass ", begin)]
        if begin >= 0 and any(f"{call}(answer" in body for call in ("eval", "exec", "parse_expr", "sympify")):
            found.add(name)
    assert found == set(contained.EVALUATING), reasoning_gym.__file__
    assert contained.table()[0][0] == "mathematics" and len(contained.table()) == 1 + len(found)


@pytest.mark.parametrize("name", contained.EVALUATING)
def test_what_evaluates_still_scores_right_answers(confine_any, name):
    problems = problem(name, 8)
    verdicts = confine_any.score([(p.answer, box(p.reference)) for p in problems])
    assert verdicts == [RIGHT] * 8


@pytest.fixture(scope="module")
def confine_any():
    kind = next((kind for kind in sandbox.KINDS if obstacle(kind) is None), None)
    if kind is None:
        pytest.skip("; ".join(str(obstacle(kind)) for kind in sandbox.KINDS))
    with verifier_in(Confinement(kind)) as verifier:
        yield verifier


@pytest.mark.parametrize(
    ("name", "text", "verdict"),
    [
        ("countdown", "exec('1')", "refused: the name 'exec'"),
        ("countdown", "1 + __import__('os')", "refused: the name '__import__'"),
        ("countdown", "1 + '2'", 'refused: the character "\'"'),
        ("countdown", "lambda: 1", "refused: the name 'lambda'"),
        ("countdown", "1 if 2else 3", "refused: the name 'if'"),
        ("countdown", "(1).real", "refused: the name 'real'"),
        ("countdown", "1..real", "refused: the name 'real'"),
        ("countdown", "\uff45\uff58\uff45\uff43(1)", "refused: the name '\uff45\uff58\uff45\uff43'"),
        ("countdown", "1_0", "refused: the name '_0'"),
        ("countdown", "1 + 2 = 3", None),
        ("countdown", "1 \\times 2", None),
        ("countdown", "1 × 2", None),
        ("countdown", "[[1]]", None),
        ("simple_integration", "S(1) + C", "refused: the name 'S'"),
        ("simple_integration", "\\frac{x^2}{2} + C", None),
        ("intermediate_integration", "sin(1).func", "refused: the name 'func'"),
        ("polynomial_multiplication", "sympify(1)", "refused: the name 'sympify'"),
        ("string_insertion", "exec('1')", None),
        ("n_queens", "[open('/etc/passwd')]", None),
    ],
)
def test_what_is_refused_and_what_is_only_wrong(confine_any, name, text, verdict):
    (found,) = confine_any.score([(problem(name)[0].answer, box(text))])
    assert found == Verdict(0.0, verdict)


def test_a_literal_still_has_its_credit(confine_any):
    (item,) = problem("spiral_matrix")
    texts = [str([int(x) for x in item.reference.split()]), "[" * 150 + "]" * 150, "9" * 5000]
    # 0.1, which reasoning-gym gives for the right list in another form, is the least that counts.
    assert [v.score for v in confine_any.score([(item.answer, box(text)) for text in texts])] == [0.1, 0.0, 0.0]


def test_mathematics_is_read_up_to_a_length_and_a_depth(confine_any):
    deep = "{" * 61 + "1" + "}" * 61
    items = [(MathAnswer("1"), box(text)) for text in (deep, "1+" * 2500 + "1", "{" * 4 + "1" + "}" * 4)]
    failures = ["refused: more than 60 open brackets", "refused: more than 4000 characters", None]
    assert [v.failure for v in confine_any.score(items)] == failures


@pytest.mark.parametrize("code", ["x.y", "exec('1')", "[a for a in b]", "lambda: 1", "__import__('os')", "sin.f"])
def test_what_a_library_may_not_evaluate(code):
    caller = contained.__file__
    assert not contained.may_evaluate(compile(code, "<string>", "eval"), caller, frozenset("xyab"[:1]))
    for code in ("Integer (2 )**Symbol ('x' )", "sin (x )+1", "(3 + 4) * 0x5"):
        assert contained.may_evaluate(compile(code, "<string>", "eval"), caller, frozenset("x"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_hostile_answer_is_run_by_any_scorer(places):
    kind = next((kind for kind in sandbox.KINDS if obstacle(kind) is None), None)
    if kind is None:
        pytest.skip("; ".join(str(obstacle(kind)) for kind in sandbox.KINDS))
    pytest.importorskip("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    payloads = hostile.payloads(places)
    problems = {name: problem(name)[0] for name in sorted(DATASETS) if name != "composite"}
    assert len(problems) > 100  # `composite` cannot be made from JSON
    good = [(p.answer, box(p.reference)) for p in problems.values()] + [(MathAnswer("1/2"), box("0.5"))]
    bad = [(p.answer, box("no such answer")) for p in problems.values()] + [(MathAnswer("1/2"), box("0.6"))]
    evaluating = [a for a, _ in good if isinstance(a, MathAnswer) or a.dataset in contained.EVALUATING]
    jobs = [(answer, name) for answer in evaluating for name in payloads]
    # Three at each of those that evaluate nothing, all of them in turn.
    others = [answer for answer, _ in good if answer not in evaluating]
    jobs += [(answer, list(payloads)[(3 * i + k) % len(payloads)]) for i, answer in enumerate(others) for k in range(3)]
    with verifier_in(Confinement(kind)) as verifier:
        before = verifier.score([*good, *bad])
        assert [v.score for v in before[: len(good)]].count(1.0) > 95
        verdicts = verifier.score([(answer, box(payloads[name])) for answer, name in jobs])
        run = [job for job, v in zip(jobs, verdicts, strict=True) if v.score and job[0] in evaluating]
        assert run == []
        assert verifier.score([*good, *bad]) == before


BARE = (
    "import json, sys; cfg = json.loads(sys.argv[1]); sys.path += cfg['path']; "
    "from prime_trainer.verify import contained, worker; "
    "contained.EVALUATING.clear(); contained.may_evaluate = lambda *a: True; worker._REFUSED = (); "
    "worker.Guard._audit = lambda *a: None; worker.main(cfg)"
)


@pytest.mark.timeout(300)
def test_an_answer_that_runs_changes_its_own_verdict_at_most(confine, places, monkeypatch):
    monkeypatch.setattr(sandbox, "_BOOT", BARE)
    names = ["countdown", "string_insertion", "simple_integration"]
    problems = {name: problem(name)[0] for name in names}
    others = [
        *[(p.answer, box(p.reference)) for p in problems.values()],
        *[(p.answer, box("12345")) for p in problems.values()],
        (MathAnswer("1/2"), box("0.5")), (MathAnswer("1/2"), box("0.6")),
    ]  # fmt: skip
    expected = [RIGHT] * 3 + [WRONG] * 3 + [RIGHT, WRONG]
    with verifier_in(confine, seconds=1.5) as verifier:
        # Without the barriers texts do run: the test below could not fail otherwise.
        ran = verifier.score([(problems["string_insertion"].answer, box("exec('while True: pass')"))])
        assert ran == [Verdict(0.0, "time limit")]
        pid = verifier._pool.pid
        for payload in hostile.payloads(places).values():
            jobs = [(p.answer, box(payload)) for p in problems.values()]
            verdicts = verifier.score([*jobs, *others])
            assert verdicts[len(jobs) :] == expected, payload
            assert all(type(v.score) is float and 0.0 <= v.score <= 1.0 for v in verdicts)
        assert verifier.score(others) == expected
        assert verifier._pool.pid == pid  # the process itself was not ended by any of them


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", (0.0, "worker died")),
        (b"\0" * 8 + b"\n", (0.0, None)),
        (b"\0" * 6 + b"\xf0\x3f" + b"\n", (1.0, None)),
        (b"\0" * 8 + b"why\n", (0.0, "why")),
        (b"\0" * 6 + b"\xf0\x3f" + b"why\n", (0.0, "malformed reply from worker")),
        (b"\0" * 6 + b"\xf8\x7f" + b"\n", (0.0, "malformed reply from worker")),
        (b"\0" * 6 + b"\x00\x40" + b"\n", (0.0, "malformed reply from worker")),
        (b"short\n", (0.0, "malformed reply from worker")),
        (b"x" * 2000 + b"\n", (0.0, "malformed reply from worker")),
        (b"no end of line", (0.0, "malformed reply from worker")),
    ],
)
def test_a_result_is_a_number_and_a_sentence(data, result):
    assert worker._read_result(data) == result


def test_equal_answers_are_scored_once_and_slow_ones_beside_the_others(confine_any):
    towers = [(MathAnswer(str(i)), box("9^{9^{9^{9}}} + 1/x")) for i in range(3)]
    (item,) = problem("countdown")
    slow = [(item.answer, box(f"9**9**9**{i}")) for i in (9, 8, 9, 9, 9, 7)]
    quick = [(MathAnswer(str(i)), box(f"{i}.0")) for i in range(20)]
    begin = time.monotonic()
    verdicts = confine_any.score([*slow, *towers, *quick])
    assert time.monotonic() - begin < 40  # three slow ones at once: six after another take 30 on an idle machine
    assert verdicts[:6] == [Verdict(0.0, "time limit")] * 6
    assert verdicts[9:] == [RIGHT] * 20


def test_no_confinement_is_refused_for_answers_too(monkeypatch):
    monkeypatch.setattr(sandbox, "obstacle", lambda kind, packages=(): f"{kind} is not here")
    answer = MathAnswer("1/2")
    with Verifier(5.0, 1) as verifier, pytest.raises(SandboxError, match=r"allow_unsafe = true"):
        verifier.score([(answer, box("0.5"))])
    with Verifier.from_config(TaskConfig(allow_unsafe=True)) as verifier:
        assert verifier.score([(answer, box("0.5")), (answer, box("0.6"))]) == [RIGHT, WRONG]


def test_the_answer_is_json_on_the_way(confine_any):
    (item,) = problem("spiral_matrix")
    assert isinstance(item.answer, GymAnswer)
    copy = GymAnswer(item.answer.dataset, json.loads(json.dumps(item.answer.entry)), item.answer.params)
    assert confine_any.score([(copy, box(item.reference))]) == [RIGHT]
