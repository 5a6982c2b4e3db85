"""The programs of `hostile` in every sandbox that works here; what they may have done is looked for from outside."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest
from helpers import hostile
from helpers.programs import LIMITS, PACKAGES, asserts, calls, run, stdio

from prime_trainer import loop
from prime_trainer.config.sections import TaskConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.verify import SandboxError, Verdict, Verifier, mounts
from prime_trainer.verify import sandbox as sandbox_module
from prime_trainer.verify.answers import MathAnswer, StdioTests
from prime_trainer.verify.sandbox import Confinement, Limits, Session, confinement, obstacle
from prime_trainer.verify.verifier import CodeOptions

SHARED = Path(os.environ.get("PRIME_KERNELS_SHARED", Path(__file__).resolve().parents[4] / "shared"))


class Watch(threading.Thread):
    """Looks at all processes again and again: the largest that a sandbox holds, and how many at once."""

    def __init__(self):
        super().__init__(daemon=True)
        self.resident = self.threads = 0
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.02):
            for pid in confined():
                try:
                    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                except OSError:
                    continue
                self.resident = max(self.resident, int(lines.get("VmRSS", "0 kB").split()[0]) >> 10)
                self.threads = max(self.threads, int(lines["Threads"]))


SESSIONS = set()


@pytest.fixture(autouse=True)
def sessions(monkeypatch):
    """Notes the session of every process that is started for a sandbox: nothing in one can leave it."""
    spawn = Session._spawn

    def noted(self, *args, **options):
        process = spawn(self, *args, **options)
        SESSIONS.add(process.pid)
        return process

    monkeypatch.setattr(Session, "_spawn", noted)


def confined():
    """The processes of all sandboxes of these tests, but not the dead ones that wait to be forgotten."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit():
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                if int(session) in SESSIONS and state != "Z":
                    found.append(entry.name)
        except OSError:
            pass
    return found


def look(folder):
    stat = (folder / "secret.txt").stat()
    return stat.st_mode, stat.st_ino, stat.st_nlink, stat.st_uid, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def nothing_left(seconds=2.0):
    """Whether no process of a sandbox is there; the kernel may need a moment for those that were killed."""
    deadline = time.monotonic() + seconds
    while confined() and time.monotonic() < deadline:
        time.sleep(0.02)
    return confined() == []


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A secret in many places, and everything that a program should not touch; checked afterwards."""
    secret, marker = f"secret-{uuid.uuid4().hex}", f"mark-{uuid.uuid4().hex}"
    # Not below pytest's own folder, which only its user can enter: the sandbox must refuse, not the file's mode.
    folder = Path(tempfile.mkdtemp(prefix="prime-hostile-"))
    folder.chmod(0o777)
    (folder / "secret.txt").write_text(secret)
    (folder / "secret.txt").chmod(0o666)
    home = Path.home() / ".prime-secret"
    home.write_text(secret)
    monkeypatch.setenv("PRIME_SECRET", secret)
    heard = []
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(str(folder / "socket"))
    (folder / "socket").chmod(0o777)
    listeners[2].bind(f"\0prime-{marker}")
    for listener in listeners:
        listener.listen()
        listener.setblocking(False)
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", secret])
    signals = [signal.SIGHUP, signal.SIGUSR1, signal.SIGIO, signal.SIGTERM]
    before = {s: signal.signal(s, lambda number, frame: heard.append(number)) for s in signals}
    port = listeners[0].getsockname()[1]
    written = [
        str(folder),
        str(Path.home()),
        "/",
        "/tmp",
        "/var/tmp",
        "/dev/shm",
        os.getcwd(),
        sys.prefix,
        "/etc",
        "/usr",
    ]
    state = (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(victim.pid), socket.gethostname())
    stamp = look(folder)
    try:
        yield {
            "secret": secret, "marker": marker, "folder": folder, "home": Path.home(), "port": port,
            "trainer": os.getpid(), "victim": victim.pid, "places": [f"{p}/{marker}" for p in written],
        }  # fmt: skip
        for listener in listeners:
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert heard == []
        assert victim.poll() is None
        assert state == (os.getpriority(os.PRIO_PROCESS, 0), os.sched_getaffinity(victim.pid), socket.gethostname())
        assert (folder / "secret.txt").read_text() == secret
        assert look(folder) == stamp
        assert sorted(os.listdir(folder)) == ["secret.txt", "socket"]
        assert not [path for folder in written for path in Path(folder).glob(f"{marker}*")]
        assert nothing_left()
    finally:
        victim.kill()
        victim.wait()
        for number, handler in before.items():
            signal.signal(number, handler)
        for listener in listeners:
            listener.close()
        home.unlink()
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


FORMS = {
    "stdio": lambda secret: stdio(["1\n", "2\n"], [secret, secret]),
    "calls": lambda secret: calls("solve", [[1], [2]], [secret, [secret]]),
    "asserts": lambda secret: asserts(
        [
            f"assert all(solve(x) == {secret!r} for x in [1, 2])",
            f"assert all(map(lambda x: solve(x) == {secret!r}, [1]))",
        ],
        ["solve"],
    ),
}


@pytest.mark.timeout(600)
def test_hostile_programs_score_zero_and_change_nothing(sandbox, places, monkeypatch):
    programs = hostile.programs(places)
    assert len(programs) >= 40
    over = []
    close = Session.close

    def timed(session):
        close(session)
        if hasattr(session, "deadline"):
            over.append(time.monotonic() - session.deadline)

    monkeypatch.setattr(Session, "close", timed)
    forms = list(FORMS)
    # What forges is tried against every form of test, the rest against one each.
    jobs = [
        (name, form)
        for i, name in enumerate(programs)
        for form in (forms if name.startswith("forging") else [forms[i % len(forms)]])
    ]
    watch = Watch()
    watch.start()
    verdicts = run(sandbox, [(FORMS[form](places["secret"]), programs[name]) for name, form in jobs])
    watch.done.set()
    watch.join()
    assert {job: v for job, v in zip(jobs, verdicts, strict=True) if v.score} == {}
    assert len(over) == len(jobs) and max(over) < 1.0
    assert watch.resident <= LIMITS.memory_mb and 1 < watch.threads <= 64


def test_what_finds_the_secret_scores_one(sandbox, places):
    """The test above could not fail otherwise: outside a sandbox the same programs find the secret and are right."""
    programs = hostile.programs(places)
    names = ["looking: files of the home directory", "looking: a file of everybody", "looking: command lines"]
    unsafe = Confinement("unsafe")
    assert [v.score for v in run(unsafe, [(FORMS["stdio"](places["secret"]), programs[n]) for n in names])] == [1.0] * 3
    told = "print(" + repr(places["secret"]) + ")\ndef solve(*a):\n    return " + repr(places["secret"])
    verdicts = run(sandbox, [(form(places["secret"]), told) for form in FORMS.values()])
    assert verdicts == [Verdict(1.0, None)] * 3


def test_one_verifier_scores_mathematics_and_code_at_once_and_counts_time_outs(sandbox):
    options = CodeOptions(lambda: sandbox, Limits(1.5), workers=2)
    items = [
        (MathAnswer("1/2"), "\\boxed{0.5}"),
        (stdio(["1\n"], ["1\n"]), "so\n```python\nprint(input())\n```\ndone"),
        (stdio(["1\n"], ["1\n"]), "first\n```\nprint(1)\n```\nbut\n```python\nwhile True: pass\n```"),
        (stdio(["1\n"], ["1\n"]), "print(1)"),
        (calls("f", [[[1, [2]]]], [[[1, [2]]]]), "```python\ndef f(x):\n    return tuple(x)\n```"),
        (MathAnswer("3"), "3"),
    ]
    with Verifier(5.0, 1, code=options) as verifier:
        verdicts = verifier.score(items)
        assert [v.score for v in verdicts] == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
        assert [v.failure for v in verdicts] == [None, None, "time limit", None, None, None]
        # Ctrl-C while programs run: nothing of them is left, and the next batch is scored.
        timer = threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGINT])
        timer.start()
        sleeper = (stdio(["1\n"], ["1\n"]), "```python\nimport time\ntime.sleep(60)\n```")
        begin = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            verifier.score([sleeper] * 6)
        assert time.monotonic() - begin < 10 and nothing_left()
        assert verifier.score(items[1:2]) == [Verdict(1.0, None)]


def test_no_sandbox_is_refused_with_what_to_install_and_allowed_by_hand(monkeypatch, tmp_path):
    absent = {kind: f"{kind} does not work here (no reason)" for kind in sandbox_module.KINDS}
    monkeypatch.setattr(sandbox_module, "obstacle", lambda kind, packages=(): absent[kind])
    with pytest.raises(
        SandboxError, match=r"bubblewrap does not.*; landlock does not.*\)\. Set task\.allow_unsafe"
    ) as e:
        confinement("auto")
    assert "nstall" not in str(e.value)  # nothing that is missing
    absent["bubblewrap"] = "bubblewrap is not installed (apt-get install bubblewrap)"
    absent["landlock"] = "libseccomp is not installed (apt-get install libseccomp2): no such file"
    with pytest.raises(
        SandboxError, match=r"Install what is missing \(apt-get install bubblewrap libseccomp2\), or set"
    ):
        confinement("auto")
    with pytest.raises(SandboxError, match="libseccomp is not installed"):
        confinement("landlock", allow_unsafe=True)
    assert confinement("auto", allow_unsafe=True) == Confinement("unsafe")
    row = {"prompt": "q", "ability": "code", "reward_model": {"ground_truth": {"inputs": [""], "outputs": [""]}}}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row | {"prompt": p}) + "\n" for p in "pq"))
    with pytest.raises(SandboxError, match=r"or set task\.allow_unsafe = true"):
        load_task(TaskConfig(kind="jsonl", path=tmp_path / "d.jsonl", eval_size=1), 0)
    monkeypatch.undo()
    monkeypatch.setattr(sandbox_module.shutil, "which", lambda name: None)
    obstacle.cache_clear()
    assert obstacle("bubblewrap") == "bubblewrap is not installed (apt-get install bubblewrap)"
    obstacle.cache_clear()


def test_auto_says_once_what_confines_and_why(monkeypatch, capsys):
    reasons = {"bubblewrap": "bubblewrap does not work here (no namespaces)", "landlock": None}
    monkeypatch.setattr(sandbox_module, "obstacle", lambda kind, packages=(): reasons[kind])
    sandbox_module._say.cache_clear()
    assert [confinement("auto").kind for _ in range(3)] == ["landlock"] * 3
    line = "prime-trainer: landlock confines answers and programs of the model; bubblewrap does not work here"
    assert capsys.readouterr().err == f"{line} (no namespaces)\n"
    assert confinement("landlock").kind == "landlock"  # who asks for it knows
    assert capsys.readouterr().err == ""
    sandbox_module._say.cache_clear()


def test_what_lies_under_tmp_is_seen_by_programs_and_nothing_else_there(sandbox, monkeypatch, tmp_path):
    """As where Python's environment and the checkout are in /tmp, which is private in bubblewrap."""
    assert tmp_path.is_relative_to("/tmp")
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents[:-2]:
        folder.chmod(0o755)
    inside = tmp_path / "checkout" / "sandboxed"
    shutil.copytree(mounts.INSIDE, inside)
    package = tmp_path / "environment" / "site-packages" / "a_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("ANSWER = 42\n")
    (tmp_path / "environment" / "secret").write_text("secret")
    monkeypatch.setattr(mounts, "INSIDE", inside)
    monkeypatch.setattr(sandbox_module, "INSIDE", inside)
    monkeypatch.syspath_prepend(package.parent)
    looks = f"import a_package, os\nprint(a_package.ANSWER, os.path.exists({str(tmp_path / 'environment/secret')!r}))"
    hidden = sandbox.kind == "bubblewrap"  # Landlock hides no names, and refuses to open what they name
    reads = f"try:\n    print(open({str(tmp_path / 'environment/secret')!r}).read())\nexcept OSError:\n    print('no')"
    jobs = [(stdio([""], [f"42 {not hidden}"]), looks), (stdio([""], ["no"]), reads)]
    verdicts = run(Confinement(sandbox.kind, ("a_package",)), jobs, limits=Limits(20.0))
    assert verdicts == [Verdict(1.0, None)] * 2


def test_a_private_folder_holds_few_files_however_empty(sandbox):
    if sandbox.kind != "bubblewrap":
        pytest.skip("Landlock gives programs no folder to write to")
    program = """
import os
made = 0
for folder in ('/tmp', '/dev/shm', '/dev', '/', '/tmp/deep'):
    try:
        os.makedirs(folder, exist_ok=True)
        for i in range(5000):
            os.close(os.open(f'{folder}/{i}', os.O_CREAT | os.O_WRONLY))
            made += 1
    except OSError:
        pass
print(0 < made < 1100)
"""
    assert run(sandbox, [(stdio([""], ["True"]), program)], limits=Limits(20.0)) == [Verdict(1.0, None)]


def test_mathematics_and_code_train_in_one_batch(run_config, tmp_path, monkeypatch):
    if all(obstacle(kind, PACKAGES) for kind in sandbox_module.KINDS):
        pytest.skip(f"no sandbox works here: {obstacle('bubblewrap', PACKAGES)}")
    tests = json.dumps({"inputs": ["1\n"], "outputs": ["1\n"]})
    rows = [
        {"prompt": f"{i}?", "ability": ability, "reward_model": {"ground_truth": truth}}
        for i in range(3)
        for ability, truth in (("math", str(i)), ("code", tests))
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text(
        "".join(json.dumps({**row, "prompt": f"{k}: {row['prompt']}"}) + "\n" for k, row in enumerate(rows))
    )
    answered = []

    class Watched(Verifier):
        def score(self, items):
            # The tiny model answers nothing: what it might say is put in its place.
            said = {MathAnswer: "\\boxed{0}", StdioTests: "```python\nwhile True: pass\n```"}
            answered.extend(type(answer) for answer, _ in items)
            return super().score([(answer, said[type(answer)]) for answer, _ in items])

    cfg = run_config(
        steps=1,
        task={"kind": "jsonl", "path": path, "eval_size": 2, "code_seconds": 0.5},
        rollout={"prompts_per_step": 4},
    )
    monkeypatch.setattr(loop, "Verifier", Watched)
    loop.run(cfg)
    assert set(answered) == {MathAnswer, StdioTests}
    rows = [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]
    (step,) = [row for row in rows if row["stage"] == "rl"]
    assert step["verifier_timeouts"] == step["verifier_failures"] == 2 * 3
