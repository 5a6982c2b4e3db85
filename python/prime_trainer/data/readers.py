"""Rows of JSONL and parquet files, one at a time and each with its place for error messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from ..run import hub
from ..run.jsonl import check_text, jsonl_rows, read_json, refuse

Bad = Callable[[ValueError], None]

Kind = Literal["parquet", "jsonl", "json"]
KINDS: dict[str, Kind] = {".parquet": "parquet", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json": "json"}
"""By the end of a file's name."""


def kind_of(path: Path) -> Kind | None:
    """What the name of a file says that it holds, None where it says nothing."""
    return next((kind for suffix, kind in KINDS.items() if path.name.endswith(suffix)), None)


def read_rows(
    path: Path, key: str, kind: Kind | None = None, bad: Bad = refuse
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("line 3" or "row 3", row) of a JSONL file (gzipped if its name says so), a JSON list or a parquet file,
    here or on the Hugging Face Hub (run/hub).

    `kind` None takes what the name says, JSONL where it says nothing. Raises FileNotFoundError for a missing file
    and ValueError, naming file and line, for what is no row of usable text; `bad`, if given, is called with the error
    of a single row instead, and the row left out. `key` is the setting that named the file.
    """
    files = hub.data_files(path, key)
    if files != [path]:
        return (
            (place if len(files) == 1 else f"{file.name}, {place}", row)
            for file in files
            for place, row in read_rows(file, key, kind, bad)
        )
    if path.is_dir():
        raise IsADirectoryError(f"{key}: a file is expected, got a directory: {path}")
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file: {path}")
    kind = kind or kind_of(path) or "jsonl"
    if kind == "jsonl":
        return jsonl_rows(path, bad)
    return json_rows(path, key, bad) if kind == "json" else parquet_rows(path, key)


def json_rows(path: Path, key: str, bad: Bad = refuse) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = read_json(path)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}: {path} must hold a list of objects")
    for number, row in enumerate(rows, 1):
        try:
            check_text(row, f"{path}, row {number}")
        except ValueError as error:
            bad(error)
            continue
        yield f"row {number}", row


def parquet_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    damaged = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except damaged as error:
        raise ValueError(f"{key}: {path} is not a parquet file: {_line(error)}") from None
    number = 0
    with file:
        batches = file.iter_batches()
        while True:
            try:
                batch = next(batches, None)
                rows = [] if batch is None else batch.to_pylist()
            except damaged as error:  # a page that is damaged, text that is not UTF-8
                raise ValueError(f"{key}: {path}, after row {number}: {_line(error)}") from None
            if batch is None:
                return
            for row in rows:
                number += 1
                # A column that only some rows fill is null in the others.
                yield f"row {number}", {name: value for name, value in row.items() if value is not None}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
