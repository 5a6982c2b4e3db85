"""The process that scores answers. It reads one JSON request a line and writes one JSON reply a line.

Model text is hostile: some scorers evaluate it. The process therefore runs apart from the trainer with an empty
environment and limits on memory, CPU time and file size. Where the kernel has Landlock and seccomp it can read the
Python installation and nothing else, and only compute; an audit hook refuses system access while an answer is scored,
there and elsewhere.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
from typing import IO, Any

from . import answer_scorers
from .answers import ScoredAnswer, scored_from_json
from .sandboxed import confine

MEMORY_BYTES = 2 << 30
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_REFUSED = (
    "ctypes.", "fcntl.", "ftplib.", "gc.", "http.", "os.", "pickle.", "pty.", "resource.", "shutil.", "signal.",
    "smtplib.", "socket.", "sqlite3.", "subprocess.", "sys.addaudithook", "syslog.", "tempfile.", "urllib.",
)  # fmt: skip
_NEEDED_BY_IMPORTS = {"os.listdir", "os.scandir"}


class Guard:
    """Refuses what no scorer needs (processes, sockets, writing, files outside the Python installation) while it is on.

    An audit hook stays for the life of the process, so evaluated text cannot remove it.
    """

    def __init__(self) -> None:
        self.on = False
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
        elif not event.startswith(_REFUSED) or event in _NEEDED_BY_IMPORTS:
            return
        self.refused = self.refused or event
        raise PermissionError(f"{event} is refused while an answer is scored")


def main(seconds: float, confinement: dict[str, Any] | None) -> None:
    """Serves requests from standard input until it closes; `seconds` is the limit that the trainer enforces."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Scorers may print: standard output becomes the null device, the replies keep a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _limit()
    if confinement is not None:
        confine.enter(confinement)
        confine.filter_calls(confinement["seccomp"])
    guard = Guard()
    loaded: dict[str, answer_scorers.Scorer] = {}
    for line in sys.stdin:
        request = json.loads(line)
        answer = scored_from_json(request["answer"])
        if request["op"] == "load":
            _reply(replies, _load(answer, loaded))
        else:
            _limit_cpu(seconds)
            scorer = loaded[answer_scorers.load_key(answer)]
            _reply(replies, _score(scorer, answer, request["text"], guard))


def _load(answer: ScoredAnswer, loaded: dict[str, answer_scorers.Scorer]) -> dict[str, Any]:
    try:
        loaded[answer_scorers.load_key(answer)] = answer_scorers.load(answer)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"loaded": True}


def _score(scorer: answer_scorers.Scorer, answer: ScoredAnswer, text: str, guard: Guard) -> dict[str, Any]:
    text = text.strip()
    guard.refused, guard.on = None, True
    try:
        score = scorer(answer, text) if text else 0.0
        failure = None if 0.0 <= score <= 1.0 and not math.isnan(score) else f"score out of range: {score!r:.100}"
    # SystemExit too: evaluated text may raise anything, and none of it may end the worker or count as an answer.
    except BaseException as error:
        score, failure = 0.0, f"{type(error).__name__}: {error!s:.200}"
    finally:
        guard.on = False
    if guard.refused is not None:
        failure = f"refused: {guard.refused}"
    return {"score": 0.0, "failure": failure} if failure else {"score": score, "failure": None}


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _limit() -> None:
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # standard error goes to a temporary file


def _limit_cpu(seconds: float) -> None:
    # Ends a worker in the middle of an answer whose trainer has died: nobody is left to kill it.
    usage = resource.getrusage(resource.RUSAGE_SELF)
    allowed = math.ceil(usage.ru_utime + usage.ru_stime + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, resource.RLIM_INFINITY))
