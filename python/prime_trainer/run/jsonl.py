"""JSONL files: read, append, repair."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a record. A last line that a crash cut short is left out; any other bad line is an error."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
    return rows


def _append(file: IO[str], row: Mapping[str, Any]) -> None:
    file.write(json.dumps(row, allow_nan=False) + "\n")
    file.flush()


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Keeps the wanted rows; the file is replaced as a whole, so a crash leaves the old one or the new one."""
    if not path.exists():
        return
    rows = [row for row in read_jsonl(path) if keep(row)]
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            _append(file, row)
        os.fsync(file.fileno())
    partial.replace(path)


def repair_jsonl(path: Path) -> int:
    """Cuts off a last line that an interruption left without an end; returns the number of whole lines (0: no file)."""
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
