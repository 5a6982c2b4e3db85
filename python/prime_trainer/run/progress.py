"""Progress on a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

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
