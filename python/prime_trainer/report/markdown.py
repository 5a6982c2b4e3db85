"""Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], headers: Sequence[str] | None = None) -> str:
    """A table with a line a row; `headers` are the keys in order, without them those of the first row."""
    headers = list(headers or rows[0])
    return grid(headers, ([row[key] for key in headers] for row in rows))


def grid(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> str:
    """A table of cells, each line with its end; with `numbers` all columns but the first are aligned to the right."""
    rule = ["---", *["--:" if numbers else "---"] * (len(headers) - 1)]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in (headers, rule, *rows))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
