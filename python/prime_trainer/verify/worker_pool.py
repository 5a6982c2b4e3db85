"""Long-lived worker processes that score answers: one answer in flight in each, deadlines by SIGKILL."""

from __future__ import annotations

import base64
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ..errors import RunError
from .answer_scorers import load_key
from .answers import ScoredAnswer
from .sandbox import DEVICES, library_paths, obstacle
from .seccomp import program_filter
from .verdict import TIME_LIMIT, Verdict

MAX_ANSWER_CHARS = 10_000
_START_SECONDS = 120.0
_START_ATTEMPTS = 3
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from prime_trainer.verify.worker import main; main(float(sys.argv[2]), json.loads(sys.argv[3]))"
)


class VerifierError(RunError):
    """No worker can score: a fault of the set-up, not of an answer."""


@dataclass
class _Job:
    index: int
    answer: ScoredAnswer
    text: str
    key: str


class WorkerPool:
    """Scores `(answer, text)` pairs; its workers start with the first one.

    `answer` is `Problem.answer`, `text` what the response gives as its answer. A text that takes more than `seconds`,
    ends its worker or makes the scorer raise scores 0 with a failure, and the rest of the batch is scored as usual.
    """

    def __init__(self, seconds: float, workers: int) -> None:
        if seconds <= 0 or workers < 1:
            raise ValueError(f"seconds must be positive and workers at least 1, got {seconds} and {workers}")
        self._seconds = seconds
        self._size = workers
        self._workers: list[_Worker] = []

    def close(self) -> None:
        """Ends the workers; the next `score` starts new ones."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()

    def score(self, items: Sequence[tuple[ScoredAnswer, str]]) -> list[Verdict]:
        """Returns one verdict an item, in order. Raises VerifierError when a worker cannot be started at all."""
        verdicts = [Verdict(0.0, None)] * len(items)
        jobs: deque[_Job] = deque()
        for index, (answer, text) in enumerate(items):
            if len(text) > MAX_ANSWER_CHARS:
                verdicts[index] = Verdict(0.0, "too long")
            else:
                jobs.append(_Job(index, answer, text, load_key(answer)))
        try:
            self._run(jobs, verdicts)
        except BaseException:
            # Ctrl-C above all: answers are in flight, and their replies must not be taken for later ones.
            self.close()
            raise
        return verdicts

    def _run(self, jobs: deque[_Job], verdicts: list[Verdict]) -> None:
        failed_starts = 0
        while jobs or any(worker.job for worker in self._workers):
            self._assign(jobs)
            for worker in self._wait():
                job = worker.job
                assert job is not None
                reply = worker.receive()
                if reply is None:
                    continue
                if "error" in reply:
                    raise VerifierError(f"the verifier cannot score {job.key}: {reply['error']}")
                if worker.loading:
                    if "loaded" in reply:
                        failed_starts = 0
                        worker.begin(job, self._seconds)
                        continue
                    # The worker died before it saw the answer, so the answer is not to blame.
                    failed_starts += 1
                    if failed_starts >= _START_ATTEMPTS:
                        raise VerifierError(
                            f"the verifier's worker does not start ({reply['failure']}): {worker.stderr()}"
                        )
                    jobs.appendleft(job)
                else:
                    verdicts[job.index] = Verdict(reply["score"], reply["failure"])
                worker.job = None
                if not worker.alive:
                    self._workers.remove(worker)

    def _assign(self, jobs: deque[_Job]) -> None:
        for worker in [w for w in self._workers if w.job is None and w.process.poll() is not None]:
            worker.kill()  # it died while idle
            self._workers.remove(worker)
        idle = [w for w in self._workers if w.job is None]
        while jobs and (idle or len(self._workers) < self._size):
            if not idle:
                idle.append(_Worker(self._seconds))
                self._workers.append(idle[-1])
            idle.pop().begin(jobs.popleft(), self._seconds)

    def _wait(self) -> list[_Worker]:
        """Returns the busy workers that have something to read, are to be written to, or are past their deadline."""
        busy = [worker for worker in self._workers if worker.job]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.outgoing:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            timeout = min(worker.deadline for worker in busy) - time.monotonic()
            ready = {id(key.data) for key, _ in selector.select(max(timeout, 0.0))}
        now = time.monotonic()
        return [worker for worker in busy if id(worker) in ready or worker.deadline <= now]


@lru_cache(maxsize=1)
def _confinement() -> dict[str, Any] | None:
    """What `inside.confine.enter` takes away from a worker; None where the kernel or libseccomp cannot.

    Workers keep their identity: they run no programs, and the libraries may lie where only this user reads.
    """
    if obstacle("landlock") is not None:
        return None
    roots = {os.path.realpath(p) for p in (*sys.path, sys.prefix, sys.base_prefix, *map(str, library_paths())) if p}
    paths = [[root, "read"] for root in sorted(roots) if os.path.exists(root) and root != "/"]
    return {
        "limits": {}, "uid": None, "threads": None, "landlock": [*paths, *DEVICES],
        "seccomp": base64.b64encode(program_filter()).decode(),
    }  # fmt: skip


class _Worker:
    """One process, at most one request in flight. Its pipes never block the trainer, even if the process is stopped."""

    def __init__(self, seconds: float) -> None:
        path = [os.path.abspath(entry) for entry in sys.path]
        # The environment may hold credentials, and evaluated text could read it. One thread: scorers are serial.
        env = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL") if name in os.environ}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _BOOT, json.dumps(path), str(seconds), json.dumps(_confinement())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env=env,
            cwd="/",
            start_new_session=True,  # Ctrl-C is for the trainer
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.requests, False)
        os.set_blocking(self.replies, False)
        self.alive = True
        self.job: _Job | None = None
        self.loading = False
        self.deadline = math.inf
        self.outgoing = memoryview(b"")
        self._incoming = b""
        self._loaded: set[str] = set()

    def begin(self, job: _Job, seconds: float) -> None:
        """Sends the answer, or first the request to load its scorer, which its time limit does not include."""
        if self.loading and self.job is job:
            self._loaded.add(job.key)
        self.job = job
        self.loading = job.key not in self._loaded
        request = {"op": "load" if self.loading else "score", "answer": job.answer.to_json()}
        if not self.loading:
            request["text"] = job.text
        self.deadline = time.monotonic() + (_START_SECONDS if self.loading else seconds)
        self.outgoing = memoryview(json.dumps(request).encode() + b"\n")
        self._write()

    def receive(self) -> dict[str, Any] | None:
        """Returns the reply, a failure (the worker is dead then), or None when there is no whole reply yet."""
        if time.monotonic() >= self.deadline:
            return self._fail(TIME_LIMIT)
        self._write()
        try:
            chunk = os.read(self.replies, 1 << 16)
        except BlockingIOError:
            return None
        self._incoming += chunk
        if not chunk or len(self._incoming) > 1 << 16:
            return self._fail("worker died" if not chunk else "worker talked nonsense")
        if not self._incoming.endswith(b"\n"):
            return None
        line, self._incoming = self._incoming, b""
        return self._check(line)

    def _check(self, line: bytes) -> dict[str, Any]:
        # Evaluated text may have written to the pipe: only a well-formed reply counts.
        try:
            reply = json.loads(line)
            valid = isinstance(reply, dict)
            if valid and self.loading:
                valid = "loaded" in reply or "error" in reply
            elif valid:
                valid = 0.0 <= float(reply["score"]) <= 1.0 and isinstance(reply["failure"], (str, type(None)))
                valid = valid and "error" not in reply
        except (ValueError, TypeError, KeyError, RecursionError):
            valid = False
        if not valid:
            return self._fail("worker talked nonsense")
        if (reply.get("failure") or "").startswith("refused"):
            return self._fail(reply["failure"])  # the text may have changed more than was refused
        return reply

    def _write(self) -> None:
        try:
            while self.outgoing:
                self.outgoing = self.outgoing[os.write(self.requests, self.outgoing) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.outgoing = memoryview(b"")  # the end of its replies says the rest

    def _fail(self, failure: str) -> dict[str, Any]:
        self.kill()
        return {"score": 0.0, "failure": failure}

    def stderr(self) -> str:
        """The last of what the process wrote to standard error; valid once it is dead."""
        return self._last_words or "it wrote no error"

    def kill(self) -> None:
        if not self.alive:
            return
        self.alive = False
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self._errors.seek(0)
        self._last_words = self._errors.read()[-2000:].decode(errors="replace").strip()
        self._errors.close()
