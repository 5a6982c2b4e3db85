"""Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def table(rows: Sequence[Mapping[str, Any]], headers: Sequence[str] | None = None) -> str:
    """A table with a line a row; `headers` are the keys in order, without them those of the first row."""
    headers = list(headers or rows[0])
    lines = [headers, ["---"] * len(headers)]
    lines += [[str(row[key]).replace("|", "\\|").replace("\n", " ") for key in headers] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
