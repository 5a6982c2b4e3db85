"""Heartbeats: if a rank dies or stops, the others name it and exit, within a minute.

A collective with a dead rank hangs until its timeout or fails with a socket error. So a thread of each rank writes
heartbeats to the rendezvous store, also during collectives, and reads those of the others.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

from ..errors import RunError
from .ranks import Ranks, restarts

BEAT_SECONDS = 1.0
DEAD_SECONDS = 40.0
"""A rank without a heartbeat for this long is dead; a starved thread is late by less."""
EXIT_STATUS = 1


class Watch:
    """Writes this rank's heartbeats and checks the others, over a separate connection to the store."""

    def __init__(self, ranks: Ranks, dead_seconds: float = DEAD_SECONDS) -> None:
        import torch.distributed as dist

        self.ranks, self.dead_seconds = ranks, dead_seconds
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # The store's own client is busy while a collective waits.
        self._store: Any = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=dead_seconds))
        self._done = threading.Event()
        self._beats = {rank: (b"", time.monotonic()) for rank in range(ranks.size) if rank != ranks.rank}
        self._store.set(self._key("host", ranks.rank), f"{socket.gethostname()}, pid {os.getpid()}")
        self._beat()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def verdict(self, seconds: float) -> str | None:
        """Names the rank that died or stopped, waiting up to `seconds` for it to be known; None if none did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self._look()
            if found is not None:
                return found
            time.sleep(BEAT_SECONDS / 2)
        return None

    def stop(self, reason: str | None) -> None:
        """Ends this rank's heartbeats; the others are told `reason`, None for a normal end."""
        self._done.set()
        self._thread.join()
        with suppress(RuntimeError):  # the store is gone, which the others notice
            self._store.set(self._key("end", self.ranks.rank), reason or "done")

    def _key(self, what: str, rank: int) -> str:
        # torchrun keeps its store when it restarts the ranks.
        return f"prime_trainer/{restarts()}/{what}/{rank}"

    def _beat(self) -> None:
        self._store.set(self._key("beat", self.ranks.rank), str(time.monotonic_ns()))

    def _look(self) -> str | None:
        try:
            for rank, (last, since) in self._beats.items():
                end = self._read("end", rank)
                if end is not None and end != b"done":
                    return f"rank {rank} ({self._host(rank)}) has stopped: {end.decode()}"
                beat = self._read("beat", rank)
                if end is not None or (beat is not None and beat != last):
                    self._beats[rank] = (beat or b"", time.monotonic())
                elif time.monotonic() - since > self.dead_seconds:
                    return f"rank {rank} ({self._host(rank)}) has not been heard of for {self.dead_seconds:.0f} s"
        except RuntimeError:  # DistNetworkError among them
            return "rank 0, or the launcher that keeps the ranks' store, is gone"
        return None

    def _read(self, what: str, rank: int) -> bytes | None:
        key = self._key(what, rank)
        return self._store.get(key) if self._store.check([key]) else None

    def _host(self, rank: int) -> str:
        found = self._read("host", rank)
        return "never started" if found is None else found.decode()

    def _run(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            with suppress(RuntimeError):  # _look reports it
                self._beat()
            found = self._look()
            if found is not None and not self._done.is_set():
                # The training thread may be in a collective that nothing interrupts.
                self._done.wait(BEAT_SECONDS * 5)  # unless it sees the end itself, and can say more
                if not self._done.is_set():
                    print(f"prime-trainer: error: {_message(self.ranks, found)}", file=sys.stderr, flush=True)
                    os._exit(EXIT_STATUS)


def _message(ranks: Ranks, found: str) -> str:
    return f"{found}; rank {ranks.rank} of {ranks.size} ends too. --resume goes on from the last checkpoint"


@contextmanager
def watched(ranks: Ranks, dead_seconds: float = DEAD_SECONDS) -> Iterator[None]:
    """Runs one rank among several. Raises RunError, naming the rank, if another rank was the cause."""
    if ranks.size == 1:
        yield
        return
    watch = Watch(ranks, dead_seconds)
    try:
        yield
        ranks.gather(None)  # nobody leaves while another may still need it, the store that rank 0 keeps included
    except RunError as error:
        watch.stop(str(error))
        raise
    except RuntimeError as error:  # what a collective raises when its peer is gone
        found = watch.verdict(dead_seconds + 5 * BEAT_SECONDS)
        watch.stop(found or str(error).splitlines()[0])
        if found is None:
            raise
        raise RunError(_message(ranks, found)) from error
    except BaseException as error:
        watch.stop(f"{type(error).__name__}: {error}")
        raise
    watch.stop(None)
