"""Rows of JSONL and parquet files, one at a time and each with its place for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..run.jsonl import jsonl_rows


def read_rows(path: Path, key: str, kind: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields ("line 3" or "row 3", row) of a JSONL file (gzipped if its name says so), a JSON list or a parquet file.

    `kind` is "jsonl", "json" or "parquet"; None takes what the name says. Raises FileNotFoundError for a missing file
    and ValueError, naming file and line, for what is no row; `key` is the setting that named the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{key}: no such file: {path}")
    kind = kind or {".parquet": "parquet", ".json": "json"}.get(path.suffix, "jsonl")
    if kind == "jsonl":
        return jsonl_rows(path)
    return {"parquet": parquet_rows, "json": json_rows}[kind](path, key)


def json_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{key}: {path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{key}: {path} must hold a list of objects")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def parquet_rows(path: Path, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{key}: {path} is not a parquet file: {error}") from None
    number = 0
    with file:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                # A column that only some rows fill is null in the others.
                yield f"row {number}", {name: value for name, value in row.items() if value is not None}
