"""The trainer's side of a sandbox: which confinement works on this machine, and one confined process with its pipes."""

from __future__ import annotations

import base64
import itertools
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError
from .mounts import ENVIRONMENT, FILES, FILES_BYTES, INSIDE, bubblewrap, landlock_paths, package_folders, scorer_folders
from .seccomp import program_filter, scorer_filter

Kind = Literal["bubblewrap", "landlock", "unsafe"]
KINDS: tuple[Kind, ...] = ("bubblewrap", "landlock")

START_SECONDS = 30.0
_FILE_BYTES = 16 << 20
_PRIVATE = ["/tmp", FILES_BYTES, FILES]
_BOUNDS = {"nofile": 128, "core": 0, "memlock": 0, "msgqueue": 0}
SCORER_BYTES = 2 << 30
"""Address space of a process that scores answers."""
_IN_FLIGHT = 4  # answers at once for each worker: the slow ones must not hold up the others
_PYTHON = [os.path.realpath(getattr(sys, "_base_executable", sys.executable)), "-I", "-S", "-X", "utf8"]
_BOOT = (
    "import json, sys; cfg = json.loads(sys.argv[1]); sys.path += cfg['path']; "
    "from prime_trainer.verify.worker import main; main(cfg)"
)
# Numbers that systemd leaves to nobody. No limit on processes holds for root, so root lends other identities.
_IDENTITIES = range(60578, 61184)
_identity = itertools.count(random.SystemRandom().randrange(len(_IDENTITIES)))


class SandboxError(RunError):
    """No sandbox can run programs here; the message says what to install."""


class Expired(Exception):
    """The time limit passed."""


class Ended(Exception):
    """The process ended, or said what it should not."""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds on the clock from its first instruction, and MiB of address space."""

    seconds: float = 10.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Confinement:
    """How programs are confined; `packages` are the importable ones beside the standard library."""

    kind: Kind
    packages: tuple[str, ...] = ()

    def launch(self, mode: str, limits: Limits, peer: tuple[int, int] | None = None) -> list[str]:
        """The command of a confined process in one of the modes of `sandboxed/__main__.py`."""
        lends = self._lends()
        private = self.kind == "bubblewrap"
        cfg = self._confine(lends) | {
            "mode": mode,
            "seconds": limits.seconds,
            "limits": {**_BOUNDS, "as": limits.memory_mb << 20, "fsize": _FILE_BYTES},
            "landlock": [*landlock_paths(self.packages)] if self.kind == "landlock" else None,
            "files": _PRIVATE if private else None,
            "seccomp": None if self.kind == "unsafe" else base64.b64encode(program_filter()).decode(),
            "packages": package_folders(self.packages),
            "peer": peer,
        }
        command = [*_PYTHON, str(INSIDE), json.dumps(cfg)]
        return [*bubblewrap(self.packages, lends), *command] if private else command

    def launch_scorers(self, seconds: float, workers: int) -> list[str]:
        """The command of the process whose children score answers; see `worker.main`."""
        lends = self._lends()
        cfg = self._confine(lends) | {
            "seconds": seconds,
            "workers": workers,
            "limits": {**_BOUNDS, "as": SCORER_BYTES, "fsize": 1 << 20, "nofile": 2 * _IN_FLIGHT * workers + 128},
            "processes": 2 * _IN_FLIGHT * workers + 16,
            "in_flight": _IN_FLIGHT * workers,
            "landlock": [*landlock_paths((), scorers=True)] if self.kind == "landlock" else None,
            "files": _PRIVATE if self.kind == "bubblewrap" else None,
            "seccomp": None if self.kind == "unsafe" else base64.b64encode(scorer_filter()).decode(),
            "path": scorer_folders(),
        }
        command = [*_PYTHON, "-c", _BOOT, json.dumps(cfg)]
        return [*bubblewrap((), lends, scorers=True), *command] if self.kind == "bubblewrap" else command

    def _lends(self) -> bool:
        return self.kind != "unsafe" and os.geteuid() == 0 and _whole_uid_map()

    def _confine(self, lends: bool) -> dict[str, Any]:
        """Who the process is and what counts its threads."""
        # A lent identity is alone with its threads, and so is what bubblewrap puts into a user namespace. Root's lent
        # ones enter another namespace only under bubblewrap: it would take away the right to read root's files.
        threads = {"bubblewrap": "needed" if lends else "count", "landlock": "count" if lends else "wanted"}
        uid = _IDENTITIES[next(_identity) % len(_IDENTITIES)] if lends else None
        return {"uid": uid, "threads": threads.get(self.kind)}


def _whole_uid_map() -> bool:
    """Whether this user namespace has the identities that are lent out."""
    try:
        rows = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return False
    return any(first <= _IDENTITIES[0] and _IDENTITIES[-1] < first + count for first, _, count in rows)


class Session:
    """One confined process; messages go both ways. Its deadline starts when it is ready, before the first program."""

    def __init__(self, confinement: Confinement, mode: Literal["run", "calls", "tests"], limits: Limits) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._held = bytearray()
        self._limits = limits
        try:
            self._start(confinement, mode)
        except BaseException:
            self.close()
            raise

    def _start(self, confinement: Confinement, mode: str) -> None:
        if mode == "tests":
            # The tests talk to the program's sandbox directly; the trainer hears the tests' result alone.
            to_program, from_program = os.pipe(), os.pipe()
            ends = (*to_program, *from_program)
            try:
                self._spawn(confinement.launch("calls", self._limits), to_program[0], from_program[1])
                peer = (from_program[0], to_program[1])
                process = self._spawn(confinement.launch("tests", self._limits, peer), pass_fds=peer)
            finally:
                for end in ends:
                    os.close(end)
        else:
            process = self._spawn(confinement.launch(mode, self._limits))
        assert process.stdin is not None and process.stdout is not None
        self._requests, self._replies = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self.deadline = time.monotonic() + START_SECONDS
        try:
            ready = self.receive(1 << 10)
        except (Ended, Expired) as error:
            raise SandboxError(f"it does not start: {self._last_words() or type(error).__name__}") from None
        if ready != {"ready": True}:
            raise SandboxError(f"it does not start: it said {ready!r:.100}")
        self.deadline = time.monotonic() + self._limits.seconds

    def _spawn(
        self, command: list[str], stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE, **options: Any
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=self._errors, bufsize=0, env=ENVIRONMENT, cwd="/",
            start_new_session=True, **options,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def ask(self, message: dict[str, Any], cap: int) -> dict[str, Any]:
        """Sends a message and returns the reply of at most `cap` bytes. Raises Expired or Ended."""
        self.send(message)
        return self.receive(cap)

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait(self._requests, selectors.EVENT_WRITE)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended from None

    def receive(self, cap: int) -> dict[str, Any]:
        seen = 0
        while b"\n" not in memoryview(self._held)[seen:].tobytes():
            seen = len(self._held)
            self._wait(self._replies, selectors.EVENT_READ)
            try:
                chunk = os.read(self._replies, 1 << 16)
            except BlockingIOError:
                continue
            self._held += chunk
            if not chunk or len(self._held) > cap:
                raise Ended
        line, _, self._held = self._held.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Ended from None
        if not isinstance(message, dict):
            raise Ended
        return message

    def _wait(self, fd: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            if not selector.select(max(0.0, self.deadline - time.monotonic())):
                raise Expired

    def _last_words(self) -> str:
        for process in self._processes:
            process.kill()
            process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """Ends everything in the sandbox, from any thread; whoever waits for a reply gets Ended."""
        for process in self._processes:
            kill_group(process)

    def close(self) -> None:
        """Kills everything in the sandbox and waits for it."""
        self.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    if pipe is process.stdout:
                        drain(pipe.fileno())
                    pipe.close()
        self._processes.clear()
        self._errors.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def kill_group(process: subprocess.Popen[bytes]) -> None:
    # Programs cannot leave the group (no fork, no setsid); bubblewrap's processes die with its first one.
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()


def drain(fd: int, seconds: float = 2.0) -> None:
    """Reads to the end, which comes when the last process that holds the other side is gone."""
    os.set_blocking(fd, False)
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not os.read(fd, 1 << 16):
                return


@lru_cache(maxsize=8)
def obstacle(kind: Kind, packages: tuple[str, ...] = ()) -> str | None:
    """Why `kind` cannot confine programs on this machine; None where it can. Tried once, with a small program."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    try:
        if kind != "unsafe":
            program_filter()
    except OSError as error:
        return f"libseccomp is not installed (apt-get install libseccomp2): {error}"
    confine, limits = Confinement(kind, packages), Limits()
    try:
        with Session(confine, "calls", limits) as session:
            loaded = session.ask({"programs": ["import decimal\ndef probe(x):\n    return x + 1"]}, 1 << 10)
            called = session.ask({"name": "probe", "args": [41]}, 1 << 10)
        with Session(confine, "run", limits) as session:
            session.send({"programs": ["print(input())"]})
            ran = session.ask({"stdin": "42\n", "limit": 1 << 10}, 1 << 10)
    except (Ended, Expired, SandboxError, OSError) as error:
        return f"{kind} does not work here ({str(error) or type(error).__name__})"
    works = (loaded, called, ran.get("stdout")) == ({"loaded": True}, {"value": 42}, "42\n")
    return None if works else f"{kind} does not run programs here ({loaded}, {called}, {ran})"


def confinement(wanted: str, packages: Sequence[str] = (), allow_unsafe: bool = False) -> Confinement:
    """The best confinement that works here, or the `wanted` one if that is not "auto"; says once which and why.

    Raises SandboxError with every reason where none does, unless `allow_unsafe`: programs then run with limits on their
    resources alone.
    """
    packages, reasons = tuple(packages), list[str]()
    for kind in KINDS if wanted == "auto" else (wanted,):
        reason = obstacle(kind, packages)
        if reason is None:
            if wanted == "auto":
                _say(f"{kind} confines answers and programs of the model{''.join(f'; {r}' for r in reasons)}")
            return Confinement(kind, packages)  # type: ignore[arg-type]
        reasons.append(reason)
    if allow_unsafe and wanted == "auto":
        _say(f"nothing confines answers and programs of the model (task.allow_unsafe); {'; '.join(reasons)}")
        return Confinement("unsafe", packages)
    missing = [name for name, sign in (("bubblewrap", "bubblewrap is"), ("libseccomp2", "libseccomp is"))
               if any(reason.startswith(f"{sign} not installed") for reason in reasons)]  # fmt: skip
    install = f"Install what is missing (apt-get install {' '.join(missing)}), or set" if missing else "Set"
    raise SandboxError(
        f"no sandbox can score answers and run programs of the model: {'; '.join(reasons)}. {install} "
        "task.allow_unsafe = true to run programs of the model with this user's rights"
    )


@lru_cache(maxsize=8)
def _say(line: str) -> None:
    """Writes a line to standard error, once in a process."""
    print(f"prime-trainer: {line}", file=sys.stderr, flush=True)
