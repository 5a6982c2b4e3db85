"""JSON that may be damaged, and JSONL files: read with places, and appended to so that a whole line is never lost.

A line is whole when it ends with a line break. What an interruption left after the last line break is a torn tail: it
is left out when rows are read back and cut off before rows are appended. Nothing before it is ever written again.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import RunError
from .atomic_files import replace_file

Row = dict[str, Any]


def refuse(error: ValueError) -> None:
    """What to do with a bad row where nothing else is said."""
    raise error


def parse_json(text: str | bytes, where: str) -> Any:
    """The value of `text`. Raises ValueError that begins with `where`, for nesting that Python does not follow too."""
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{where}: JSON that is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The value in a file. Raises ValueError or OSError that names it."""
    return parse_json(path.read_bytes(), str(path))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises ValueError or OSError that names it."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def jsonl_rows(path: Path, bad: Callable[[ValueError], None] = refuse) -> Iterator[tuple[str, Row]]:
    """Yields ("line 3", row) of a file, gzipped if its name says so; empty lines are skipped.

    Raises ValueError, naming file and line, for a line that is no JSON object of usable text, a torn tail among them;
    `bad`, if given, is called with the error instead, and the line left out.
    """
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            try:
                row = parse_json(line, where)
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else " (the last line, without an end: the file was cut short)"
                raise ValueError(f"{error}{cut}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, got {type(row).__name__}")
            if b"\\u" in line:
                check_text(row, where)
        except ValueError as error:
            bad(error)
            continue
        yield f"line {number}", row


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped if its name says so. Raises ValueError, with the line, where that is damaged."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        number = 0
        try:
            for line in lines:
                number += 1
                yield line
        except EOFError:
            raise ValueError(f"{path}, after line {number}: the gzip file is cut short") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}, after line {number}: not gzip data: {error}") from None


def check_text(value: Any, where: str) -> None:
    """Raises ValueError for half of a surrogate pair (a lone \\ud800): text that no tokenizer takes."""
    field = _halved(value)
    if field is not None:
        raise ValueError(f"{where}: {field.lstrip('.') or 'the text'} has half of a surrogate pair, which is no text")


def _halved(value: Any, field: str = "") -> str | None:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return field
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in parts:
        below = f"{field}[{name}]" if isinstance(value, list) else f"{field}.{name!r:.40}".replace("'", "")
        found = _halved(name, "a key") if isinstance(name, str) else None
        if found is not None or (found := _halved(part, below)) is not None:
            return found
    return None


def read_jsonl(path: Path) -> list[Row]:
    """The rows of a file that the trainer wrote; none where there is no file. A torn tail is left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        whole = [line for line in file if line.endswith(b"\n")]
    rows = []
    for number, line in enumerate(whole, 1):
        rows.append(parse_json(line, f"{path}, line {number}"))
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
        self._path, self._file = path, path.open("ab", buffering=0)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the rows and waits until they are on the disk. If that fails, the file is as it was before.

        Raises RunError where the file is no longer in its place: all further rows would be lost without a word.
        """
        self._check_place()
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

    def _check_place(self) -> None:
        with suppress(OSError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno())):
                return
        raise RunError(f"{self._path} was removed or replaced while rows were appended to it: no more would be kept")

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
