"""One process at a time in an output folder: a lock that the kernel releases however its holder ends."""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from ..errors import RunError

LOCK = ".lock"
_POLL_SECONDS = 0.2
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_held: set[int] = set()
Result = TypeVar("Result")


class OwnsOutput(Protocol):
    """What of a run's configuration is about its folder."""

    @property
    def output(self) -> Path: ...

    @property
    def wait_lock(self) -> float: ...


Settings = TypeVar("Settings", bound=OwnsOutput)


@contextmanager
def output_lock(directory: Path, wait: float = 0.0, key: str = "output") -> Iterator[None]:
    """Holds `directory`, which is made where it is not there, until the block ends.

    Waits `wait` seconds for another process in it. Raises RunError with that process's id if it does not end, and
    ValueError, naming `key`, where nothing can be written: before anything is loaded.
    """
    descriptor = _open(directory, key)
    try:
        _take(descriptor, directory, wait)
        yield
    finally:
        _held.discard(descriptor)
        os.close(descriptor)  # releases the lock; the file stays, as to remove it would race with who opens it next


def owns_output(command: Callable[[Settings], Result]) -> Callable[[Settings], Result]:
    """A command that holds `cfg.output` while it runs."""

    @functools.wraps(command)
    def locked(cfg: Settings) -> Result:
        with output_lock(cfg.output, cfg.wait_lock):
            return command(cfg)

    return locked


def _open(directory: Path, key: str) -> int:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ValueError(f"{key} = '{directory}' cannot be written to: {error.strerror}: {error.filename}") from None
    _held.add(descriptor)
    return descriptor


def _forget_in_child() -> None:
    """A process that is forked from this one must not hold the lock when this one is gone."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_forget_in_child)


def _take(descriptor: int, directory: Path, wait: float) -> None:
    deadline, told = time.monotonic() + wait, False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                print(f"{directory} is on a file system without locks: nothing else must write there", file=sys.stderr)
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() >= deadline:
            after = f" after {wait:g} s" if wait else ""
            raise RunError(
                f"{directory} is in use by {_holder(descriptor)}{after}: end it, give another --output, or --wait-lock "
                "SECONDS to wait for it"
            )
        if not told:
            print(f"waiting up to {wait:g} s for {_holder(descriptor)} in {directory}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_SECONDS)
    os.truncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _holder(descriptor: int) -> str:
    """Who holds the lock, as it wrote there; it may not have written yet."""
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
