"""Ranks that watch one another: when one dies or stops, the others say which and end, within a minute.

A collective with a dead rank waits for its timeout or ends with a message about a socket. So each rank beats in the
rendezvous store from a thread, which goes on during collectives, and watches the others' beats.
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
"""Without a beat for so long a rank is dead; a thread that is kept from running beats late, but not so late."""
EXIT_STATUS = 1


class Watch:
    """Beats for this rank and looks after the others, on a connection to the store of its own."""

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
        """Which other rank is dead or has stopped, as soon as that is known; None after `seconds` without either."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self._look()
            if found is not None:
                return found
            time.sleep(BEAT_SECONDS / 2)
        return None

    def stop(self, reason: str | None) -> None:
        """This rank ends: in order if `reason` is None; else the others hear why."""
        self._done.set()
        self._thread.join()
        with suppress(RuntimeError):  # whoever kept the store is gone, and the others know by that
            self._store.set(self._key("end", self.ranks.rank), reason or "done")

    def _key(self, what: str, rank: int) -> str:
        # torchrun keeps its store when it starts the ranks anew.
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
            with suppress(RuntimeError):  # _look says so
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
    """The run of one rank among several. Raises RunError, naming the rank, where another one was the cause."""
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
