"""Turns Ctrl-C, SIGTERM and SIGHUP into a flag that the loop checks between steps."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """The first Ctrl-C or SIGTERM asks for a stop at the end of the step, the second stops at once.

    SIGHUP, a closed terminal, asks as well unless it is ignored (nohup). It is never the second signal: who closes a
    terminal or a session often sends it beside SIGTERM, or twice.
    """
    stop = threading.Event()
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if number != signal.SIGHUP:
            if asked:
                raise KeyboardInterrupt
            asked.append(number)
        if not stop.is_set():
            stop.set()
            print("\nstopping after this step; once more stops at once", file=sys.stderr, flush=True)

    watched = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        watched.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in watched}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
