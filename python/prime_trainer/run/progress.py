"""Progress on a terminal, plain lines where there is none; and standard streams that outlive whoever reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Bar(Protocol):
    def advance(self, note: str = "") -> None: ...


class _Nothing:
    def advance(self, note: str = "") -> None:
        pass


class _Lines:
    def __init__(self, name: str, total: int, done: int) -> None:
        self.name, self.total, self.done = name, total, done

    def advance(self, note: str = "") -> None:
        self.done += 1
        print(f"{self.name} {self.done}/{self.total} {note}", flush=True)


class _Rich:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def advance(self, note: str = "") -> None:
        self.progress.update(self.task, advance=1, note=note)


@contextmanager
def progress_bar(name: str, total: int, done: int = 0, shown: bool = True) -> Iterator[Bar]:
    if not shown:
        yield _Nothing()
        return
    if not sys.stderr.isatty():
        yield _Lines(name, total, done)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield _Rich(progress, progress.add_task(name, total=total, completed=done, note=""))


class _Lasting:
    """A stream whose reader may be gone (`| head`, a dead `tee`, a closed terminal); all else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:  # a terminal without these characters
                self._stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except (OSError, ValueError):
            self._give_up()
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._give_up()

    def _give_up(self) -> None:
        """Lets the descriptor lead nowhere: what is still in buffers does not fail again, nor do children."""
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """While the block runs, lines that cannot be written to standard output or error are dropped."""
    before = sys.stdout, sys.stderr
    # Without a descriptor (`>&-`) Python has no stream at all.
    out, err = (_Lasting(open(os.devnull, "w") if each is None else each) for each in before)  # noqa: SIM115
    sys.stdout, sys.stderr = out, err
    try:
        yield
    finally:
        out.flush()
        err.flush()
        sys.stdout, sys.stderr = before
