"""The trainer's side of a reward function: processes that call it, replaced when they take too long or end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from ..answers import OwnReward
from ..verdict import TIME_LIMIT, Verdict
from ..worker_pool import START_SECONDS, Died, LineProcess, VerifierError

_PACKAGES = Path(__file__).resolve().parents[3]


class RewardPool:
    """Scores `(answer, response)` pairs by a function of the user's, `(texts, problems) -> scores in [0, 1]`.

    A call gets at most `batch` texts and `seconds` for each of them. Where a call raises, ends its process or takes
    longer, its texts are scored one at a time, so that one text costs no other its score: the one to blame scores 0
    with a failure. The processes have the run's rights, environment and working directory: the function is the user's.
    """

    def __init__(self, name: str, seconds: float, workers: int | None = None, batch: int = 1) -> None:
        self.name, self._seconds, self._batch = name, seconds, batch
        self._workers = workers or len(os.sched_getaffinity(0))
        self._idle: SimpleQueue[LineProcess | None] = SimpleQueue()
        for _ in range(self._workers):
            self._idle.put(None)  # not started yet
        self._pids: set[int] = set()
        self._ending = False

    def check(self) -> None:
        """Starts the first process. Raises VerifierError where the function cannot be imported."""
        process = self._idle.get()
        self._idle.put(process or self._start())

    def close(self) -> None:
        """Ends the processes; the next `score` starts new ones."""
        for _ in range(self._workers):
            process = self._idle.get()
            if process is not None:
                self._pids.discard(process.pid)
                process.kill()
            self._idle.put(None)

    def score(self, items: Sequence[tuple[OwnReward, str]]) -> list[Verdict]:
        """Returns one verdict an item, in order.

        Raises VerifierError where the function cannot be imported or returns what are no scores.
        """
        parts = [items[at : at + self._batch] for at in range(0, len(items), self._batch)]
        with ThreadPoolExecutor(self._workers, thread_name_prefix="reward") as threads:
            found = [threads.submit(self._part, part) for part in parts]
            try:
                return [verdict for future in found for verdict in future.result()]
            except BaseException:
                # Ctrl-C above all: nobody waits for the limits of what is under way.
                self._ending = True
                for pid in list(self._pids):
                    os.kill(pid, signal.SIGKILL)
                raise
            finally:
                threads.shutdown()
                self._ending = False

    def _part(self, items: Sequence[tuple[OwnReward, str]]) -> list[Verdict]:
        process = self._idle.get()
        try:
            if self._ending:
                return []
            process = process or self._start()
            self._pids.add(process.pid)
            process.send({"texts": [text for _, text in items], "problems": [answer.problem for answer, _ in items]})
            reply = process.receive(self._seconds * len(items))
        except Died as error:
            assert process is not None
            self._pids.discard(process.pid)
            process.kill()
            process, reply = None, {"failure": TIME_LIMIT if error.late else "worker died"}
        finally:
            self._idle.put(process)
        if "wrong" in reply:
            raise VerifierError(f"task.reward = {self.name!r}: {reply['wrong']}")
        if "scores" in reply:
            return [Verdict(score, None) for score in reply["scores"]]
        if len(items) > 1:
            return [verdict for item in items for verdict in self._part([item])]
        return [Verdict(0.0, reply["failure"])]

    def _start(self) -> LineProcess:
        path = os.pathsep.join([str(_PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "prime_trainer.verify.rewards.worker", self.name]
        process = LineProcess(command, os.environ | {"PYTHONPATH": path}, os.getcwd())
        try:
            reply = process.receive(START_SECONDS)
        except Died as error:
            raise VerifierError(f"task.reward = {self.name!r} does not start ({error}): {process.kill()}") from None
        if "error" in reply:
            process.kill()
            raise VerifierError(f"task.reward = {self.name!r} cannot be imported: {reply['error']}")
        return process
