"""The process whose children score answers: it is confined, imports the scorers, and forks once for every answer.

Model text is hostile: some scorers evaluate it. So a text is read only in a child that did nothing before and does
nothing after. Of the child's descriptors only a pipe of its own is left; it can read the Python installation, compute
and write into that pipe. This process never reads a text: it starts children, takes their results as 8 bytes of a
number and a sentence, and kills them, with SIGKILL, when they have answered or their time is over.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import json
import math
import os
import resource
import selectors
import signal
import struct
import sys
import time
from collections import deque
from typing import Any

from . import answer_scorers, contained
from .answers import MathAnswer, ScoredAnswer, scored_from_json
from .sandboxed import confine
from .verdict import TIME_LIMIT

CHILD_BYTES = 768 << 20
"""Private memory of the process that scores one answer."""
PATIENCE = 2.0
"""An answer that other processes keep from running may take so many times its limit on the clock."""
_SHARE = 0.2  # of the limit, in processor time: an answer that got less of a busy machine is not ended yet
_QUICK = 0.5  # seconds after which an answer is slow: others start beside it, and it steps back for them
_SLEEPS = 0.02
_RESULT = 1024
_MESSAGES = 1 << 16
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "ctypes.", "fcntl.", "ftplib.", "gc.", "http.", "os.", "pickle.", "pty.", "resource.", "shutil.", "signal.",
    "smtplib.", "socket.", "sqlite3.", "subprocess.", "sys.addaudithook", "syslog.", "tempfile.", "urllib.",
)  # fmt: skip
_NEEDED_BY_IMPORTS = {"os.listdir", "os.scandir"}


class Guard:
    """Refuses what no scorer needs (processes, sockets, writing, files outside the Python installation, evaluating more
    than arithmetic) while it is on. An audit hook stays for the life of the process.
    """

    def __init__(self) -> None:
        self.on = False
        self.names: frozenset[str] = frozenset()
        self.refused: str | None = None
        self._roots = tuple(os.path.join(p, "") for p in {*sys.path, sys.prefix, sys.base_prefix} if p)
        sys.addaudithook(self._audit)

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = args
            # Reading there must work: libraries import their parts when they first need them.
            installed = isinstance(path, (str, bytes)) and os.path.abspath(os.fsdecode(path)).startswith(self._roots)
            if installed and not flags & _WRITES:
                return
        elif event == "exec":
            if contained.may_evaluate(args[0], sys._getframe(1).f_code.co_filename, self.names):
                return
        elif not event.startswith(_REFUSED) or event in _NEEDED_BY_IMPORTS:
            return
        self.refused = self.refused or event
        raise PermissionError(f"{event} is refused while an answer is scored")


class _Child:
    """An answer that is being scored."""

    def __init__(self, number: int, pid: int, pipe: int) -> None:
        self.number, self.pid, self.pipe = number, pid, pipe
        self.begin = time.monotonic()
        self.slow = False
        self.result = b""

    def over(self, seconds: float, now: float) -> bool:
        """Whether its time is over: `seconds` on the clock, more where it waited for a processor."""
        elapsed = now - self.begin
        if elapsed < seconds:
            return False
        # The processor-time clock of another process, see clock_getcpuclockid(3).
        used = time.clock_gettime(~self.pid << 3 | 2)
        waits = _SLEEPS * elapsed < used < _SHARE * seconds
        return not waits or elapsed >= PATIENCE * seconds


class _Server:
    def __init__(self, cfg: dict[str, Any]) -> None:
        self._requests, self._replies = os.dup(0), os.dup(1)
        self._null = os.open(os.devnull, os.O_RDWR)
        os.dup2(self._null, 0), os.dup2(self._null, 1)
        os.set_blocking(self._requests, False)
        self._seconds: float = cfg["seconds"]
        self._workers: int = cfg["workers"]
        self._in_flight: int = cfg["in_flight"]
        self._filter = None if cfg["seccomp"] is None else base64.b64decode(cfg["seccomp"])
        self._guard = Guard()
        self._loaded: dict[str, answer_scorers.Scorer] = {}
        self._waiting: deque[dict[str, Any]] = deque()
        self._children: dict[int, _Child] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._requests, selectors.EVENT_READ)
        self._incoming = b""

    def serve(self) -> None:
        """Serves requests until there can be no more."""
        self._reply({"ready": True})
        while True:
            ready = [key.fd for key, _ in self._selector.select(self._timeout())]
            for fd in ready:
                if fd == self._requests:
                    if not self._receive():
                        return
                else:
                    self._collect(self._children[fd])
            self._end_overdue()
            self._start_waiting()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        moments = [c.begin + (self._seconds if c.slow else min(_QUICK, self._seconds)) for c in self._children.values()]
        # One that is past its limit but waited for a processor is looked at again soon.
        return max(min(moments) - now, 0.05) if moments else None

    def _receive(self) -> bool:
        chunk = os.read(self._requests, _MESSAGES)
        *lines, self._incoming = (self._incoming + chunk).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if request["op"] == "load":
                self._reply(self._load(scored_from_json(request["answer"])))
            else:
                self._waiting.append(request)
        return bool(chunk)

    def _load(self, answer: ScoredAnswer) -> dict[str, Any]:
        try:
            scorer = self._loaded[answer_scorers.load_key(answer)] = answer_scorers.load(answer)
            if isinstance(answer, MathAnswer):
                _warm(scorer)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        # Collections in a child would write to every page of what is loaded, which it shares until it writes.
        gc.collect()
        gc.freeze()
        return {"loaded": True}

    def _start_waiting(self) -> None:
        quick = sum(not child.slow for child in self._children.values())
        while self._waiting and quick < self._workers and len(self._children) < self._in_flight:
            self._start(self._waiting.popleft())
            quick += 1

    def _start(self, request: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                self._score(request, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        child = self._children[ours] = _Child(request["number"], pid, ours)
        self._selector.register(child.pipe, selectors.EVENT_READ)

    def _collect(self, child: _Child) -> None:
        chunk = os.read(child.pipe, _RESULT)
        child.result += chunk
        if len(chunk) and len(child.result) <= _RESULT and not child.result.endswith(b"\n"):
            return
        self._end(child, *_read_result(child.result))

    def _end_overdue(self) -> None:
        now = time.monotonic()
        for child in list(self._children.values()):
            if not child.slow and now - child.begin >= _QUICK:
                child.slow = True
                os.setpriority(os.PRIO_PROCESS, child.pid, 10)
            if child.over(self._seconds, now):
                self._end(child, 0.0, TIME_LIMIT)

    def _end(self, child: _Child, score: float, failure: str | None) -> None:
        os.kill(child.pid, signal.SIGKILL)  # it may have answered and live on
        os.waitpid(child.pid, 0)
        self._selector.unregister(child.pipe)
        os.close(child.pipe)
        del self._children[child.pipe]
        self._reply({"number": child.number, "score": score, "failure": failure})

    def _reply(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._replies, data) :]

    def _score(self, request: dict[str, Any], pipe: int) -> None:
        """The life of a child."""
        confine.die_with_parent()
        os.dup2(pipe, 3) if pipe != 3 else None
        os.dup2(self._null, 2)
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        seconds = math.ceil(self._seconds) + 1
        confine.limit({"cpu": seconds, "data": CHILD_BYTES})
        answer, text = scored_from_json(request["answer"]), request["text"].strip()
        scorer, self._guard.names = self._loaded[answer_scorers.load_key(answer)], contained.names(answer)
        if self._filter is not None:
            confine.filter_calls(self._filter)
        score, failure = _score(scorer, answer, text, self._guard)
        os.write(3, struct.pack("<d", score) + (failure or "").encode(errors="replace")[: _RESULT - 16] + b"\n")


def _score(scorer: answer_scorers.Scorer, answer: ScoredAnswer, text: str, guard: Guard) -> tuple[float, str | None]:
    guard.on = True
    failure = None
    try:
        if isinstance(answer, MathAnswer):
            contained.check_latex(text)
        score = scorer(answer, text) if text else 0.0
        if type(score) is not float or not 0.0 <= score <= 1.0:
            failure = f"score out of range: {score!r:.100}"
    except contained.Refused as error:
        failure = f"refused: {error}"
    # SystemExit too: what is evaluated may raise anything, and none of it counts as an answer.
    except BaseException as error:
        failure = f"{type(error).__name__}: {error!s:.200}"
    finally:
        guard.on = False
    if guard.refused is not None:
        failure = f"refused: {guard.refused}"
    return (0.0, failure) if failure else (score, None)


def _warm(scorer: answer_scorers.Scorer) -> None:
    for _ in range(2):  # the interpreter speeds up what it has seen twice
        for reference, text in contained.EXAMPLES:
            with contextlib.suppress(Exception):
                scorer(MathAnswer(reference), text)


def _read_result(data: bytes) -> tuple[float, str | None]:
    """A child's result as it is sent: a text that took its process over may have written anything, but only there."""
    if not data:
        return 0.0, "worker died"
    if len(data) < 9 or len(data) > _RESULT or not data.endswith(b"\n"):
        return 0.0, "malformed reply from worker"
    (score,) = struct.unpack("<d", data[:8])
    failure = data[8:-1].decode(errors="replace") or None
    if not 0.0 <= score <= 1.0 or (failure and score):
        return 0.0, "malformed reply from worker"
    return score, failure


def main(cfg: dict[str, Any]) -> None:
    """Serves requests from standard input until it closes; `cfg` is made by `sandbox.Confinement.launch_scorers`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(5)
    confine.enter(cfg)
    _Server(cfg).serve()
