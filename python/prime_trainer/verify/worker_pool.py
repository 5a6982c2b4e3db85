"""The trainer's side of scoring answers: one confined process, whose children score an answer each (worker.py)."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import RunError
from .answer_scorers import load_key
from .answers import ScoredAnswer
from .mounts import ENVIRONMENT
from .sandbox import Confinement, confinement, drain, kill_group
from .verdict import Verdict
from .worker import PATIENCE

MAX_ANSWER_CHARS = 10_000
START_SECONDS = 120.0
_ATTEMPTS = 3
_SPARE_SECONDS = 10.0
_AHEAD = 64  # answers that are sent before they can be scored, for each worker
_LONGEST_REPLY = 1 << 16


class VerifierError(RunError):
    """No worker can score: a fault of the set-up, not of an answer."""


class Died(Exception):
    """The process ended, stopped, or said what it should not."""

    def __init__(self, why: str, late: bool = False) -> None:
        super().__init__(why)
        self.late = late
        """Whether it merely said nothing in time."""


@dataclass
class _Job:
    """What is scored once, however often a batch has it; `indices` are its places there."""

    answer: ScoredAnswer
    text: str
    indices: list[int] = field(default_factory=list)
    attempts: int = 0


class WorkerPool:
    """Scores `(answer, text)` pairs; its process starts with the first one.

    `answer` is `Problem.answer`, `text` what the response gives as its answer. Each pair is scored in a process of its
    own; a text that takes more than `seconds`, ends its process or makes the scorer raise scores 0 with a failure, and
    the rest of the batch is scored as usual. Slow answers do not hold up quick ones: of these, `workers` are scored at
    once, None for as many as there are processors. `confine` is asked when the process starts.
    """

    def __init__(
        self, seconds: float, workers: int | None = None, confine: Callable[[], Confinement] | None = None
    ) -> None:
        if seconds <= 0 or (workers is not None and workers < 1):
            raise ValueError(f"seconds must be positive and workers at least 1, got {seconds} and {workers}")
        self._seconds = seconds
        self._workers = workers or len(os.sched_getaffinity(0))
        self._confine = confine or (lambda: confinement("auto"))
        self._process: LineProcess | None = None

    @property
    def pid(self) -> int | None:
        """The process that was started, bubblewrap's where that confines; None while there is none."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process and its children; the next `score` starts a new one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def score(self, items: Sequence[tuple[ScoredAnswer, str]]) -> list[Verdict]:
        """Returns one verdict an item, in order; equal items are scored once.

        Raises VerifierError when no process can be started at all, and SandboxError when nothing can confine it.
        """
        verdicts = [Verdict(0.0, None)] * len(items)
        jobs: dict[tuple[str, str], _Job] = {}
        keys: dict[int, str] = {}  # responses of one problem share its answer
        for index, (answer, text) in enumerate(items):
            if len(text) > MAX_ANSWER_CHARS:
                verdicts[index] = Verdict(0.0, "too long")
                continue
            key = keys.get(id(answer))
            if key is None:
                key = keys[id(answer)] = json.dumps(answer.to_json(), sort_keys=True)
            jobs.setdefault((key, text.strip()), _Job(answer, text)).indices.append(index)
        try:
            self._run(list(jobs.values()), verdicts)
        except BaseException:
            # Ctrl-C above all: answers are in flight, and their replies must not be taken for later ones.
            self.close()
            raise
        return verdicts

    def _run(self, jobs: Sequence[_Job], verdicts: list[Verdict]) -> None:
        waiting = deque(jobs)
        while waiting:
            sent: dict[int, _Job] = {}
            try:
                process = self._started({load_key(job.answer): job.answer for job in waiting})
                self._exchange(process, waiting, sent, verdicts)
            except Died:
                # All that were in flight are tried again, as nobody knows which of them is to blame, if any.
                self.close()
                for job in sent.values():
                    job.attempts += 1
                    if job.attempts < _ATTEMPTS:
                        waiting.append(job)
                    else:
                        _settle(job, Verdict(0.0, "worker died"), verdicts)

    def _started(self, answers: dict[str, ScoredAnswer]) -> LineProcess:
        """The process, with the scorers of `answers` loaded, which the time limit does not include."""
        for attempt in range(_ATTEMPTS):
            try:
                if self._process is None:
                    command = self._confine().launch_scorers(self._seconds, self._workers)
                    self._process = LineProcess(command)
                    if self._process.receive(START_SECONDS) != {"ready": True}:
                        raise Died("malformed reply from worker")
                for key in answers.keys() - self._process.loaded:
                    self._process.load(key, answers[key])
                return self._process
            except Died as error:
                process, self._process = self._process, None
                words = process.kill() if process is not None else ""
                if attempt + 1 == _ATTEMPTS:
                    raise VerifierError(f"the verifier's worker does not start ({error}): {words}") from None
        raise AssertionError

    def _exchange(
        self, process: LineProcess, waiting: deque[_Job], sent: dict[int, _Job], verdicts: list[Verdict]
    ) -> None:
        numbers = iter(range(len(waiting)))
        while waiting or sent:
            while waiting and len(sent) < _AHEAD * self._workers:
                number, job = next(numbers), waiting.popleft()
                sent[number] = job
                process.send({"op": "score", "number": number, "answer": job.answer.to_json(), "text": job.text})
            # The process keeps the limits of its children; this one is for the process itself.
            reply = process.receive(PATIENCE * self._seconds + _SPARE_SECONDS)
            scored, verdict = sent.pop(reply.get("number", -1), None), _checked(reply)
            if scored is None or verdict is None:
                raise Died("malformed reply from worker")
            _settle(scored, verdict, verdicts)


def _settle(job: _Job, verdict: Verdict, verdicts: list[Verdict]) -> None:
    for index in job.indices:
        verdicts[index] = verdict


def _checked(reply: dict[str, Any]) -> Verdict | None:
    score, failure = reply.get("score"), reply.get("failure")
    valid = type(score) is float and 0.0 <= score <= 1.0 and (failure is None or (type(failure) is str and score == 0))
    return Verdict(score, failure) if valid else None  # type: ignore[arg-type]


class LineProcess:
    """The process and its two pipes, which never block the trainer, even if the process is stopped."""

    def __init__(self, command: list[str], environment: Mapping[str, str] = ENVIRONMENT, cwd: str = "/") -> None:
        self.loaded: set[str] = set()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        # An empty environment: the trainer's may hold credentials.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0, env=environment,
            cwd=cwd, start_new_session=True,  # Ctrl-C is for the trainer
        )  # fmt: skip
        self.pid = self._process.pid
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout
        os.set_blocking(self._requests.fileno(), False)
        os.set_blocking(self._replies.fileno(), False)
        self._outgoing, self._incoming = bytearray(), bytearray()
        self._received: deque[bytes] = deque()

    def load(self, key: str, answer: ScoredAnswer) -> None:
        """Loads the scorer of `answer`. Raises VerifierError when it cannot be loaded."""
        self.send({"op": "load", "answer": answer.to_json()})
        reply = self.receive(START_SECONDS)
        if "error" in reply:
            raise VerifierError(f"the verifier cannot score {key}: {reply['error']}")
        if reply != {"loaded": True}:
            raise Died("malformed reply from worker")
        self.loaded.add(key)

    def send(self, message: dict[str, Any]) -> None:
        """Queues a message; `receive` writes it when the process reads."""
        self._outgoing += json.dumps(message).encode() + b"\n"
        self._write()

    def receive(self, seconds: float) -> dict[str, Any]:
        """The next message. Raises Died when none comes in `seconds`."""
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            if self._outgoing:
                selector.register(self._requests, selectors.EVENT_WRITE)
            while not self._received:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise Died("no reply from worker", late=True)
                if self._outgoing:
                    self._write()
                    if not self._outgoing:
                        selector.unregister(self._requests)
                self._read()
        try:
            message = json.loads(self._received.popleft())
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise Died("malformed reply from worker")
        return message

    def _read(self) -> None:
        try:
            chunk = os.read(self._replies.fileno(), 1 << 16)
        except BlockingIOError:
            return
        if not chunk:
            raise Died("worker died")
        *lines, rest = (self._incoming + chunk).split(b"\n")
        self._received.extend(bytes(line) for line in lines)
        self._incoming = bytearray(rest)
        if len(rest) > _LONGEST_REPLY:
            raise Died("malformed reply from worker")

    def _write(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: os.write(self._requests.fileno(), self._outgoing)]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outgoing.clear()  # the end of its replies says the rest

    def kill(self) -> str:
        """Ends the process and its children; returns the last of what it wrote to standard error."""
        kill_group(self._process)
        self._process.wait()
        self._requests.close()
        drain(self._replies.fileno())  # to the end, which comes when bubblewrap's inner processes are gone
        self._replies.close()
        self._errors.seek(0)
        words = self._errors.read()[-2000:].decode(errors="replace").strip()
        self._errors.close()
        return words or "it wrote no error"
