"""JSONL files: read with places, and appended to so that a whole line is never lost.

A line is whole when it ends with a line break. What an interruption left after the last line break is a torn tail: it
is left out when rows are read back and cut off before rows are appended. Nothing before it is ever written again.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .atomic_files import replace_file

Row = dict[str, Any]


def jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields ("line 3", row) of a file, gzipped if its name says so; empty lines are skipped.

    Raises ValueError, naming file and line, for a line that is no JSON object, a torn tail among them.
    """
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                cut = "" if line.endswith("\n") else " (the last line, without an end: the file was cut short)"
                raise ValueError(f"{path}, line {number}: not JSON: {error}{cut}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield f"line {number}", row


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file that the trainer wrote; none where there is no file. A torn tail is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        whole = [line for line in file if line.endswith(b"\n")]
    rows = []
    for number, line in enumerate(whole, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    return rows


def cut_torn_tail(path: Path) -> int:
    """Truncates a file to its whole lines; returns their number (0: no file)."""
    if not path.exists():
        return 0
    count = whole = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                count, whole = count + 1, whole + len(line)
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return count


def keep_rows(path: Path, keep: Callable[[Row], bool]) -> None:
    """Drops the rows that are not wanted. The file is replaced as a whole, and only if it has such rows."""
    rows = read_jsonl(path)
    kept = [row for row in rows if keep(row)]
    if len(kept) < len(rows):
        replace_file(path, jsonl_text(kept))


class JsonlWriter:
    """Appends to a file, after its torn tail is cut off; `count` is the number of whole lines. A context manager."""

    def __init__(self, path: Path) -> None:
        self.count = cut_torn_tail(path)
        self._file = path.open("ab", buffering=0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows and waits until they are on the disk. If that fails, the file is as it was before."""
        rows = list(rows)
        start, data = os.fstat(self._file.fileno()).st_size, memoryview(jsonl_text(rows).encode())
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except BaseException:
            os.ftruncate(self._file.fileno(), start)
            raise
        self.count += len(rows)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def jsonl_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """A line a row. Raises ValueError for NaN and infinity, which JSON has not."""
    return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
