"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Of brackets those of links alone, of underlines those that are not inside a word: tables are read as text, too.
_SPECIAL = re.compile(r"([\\`*<>~&]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def escaped(text: str) -> str:
    """Text in one line that Markdown shows as it is: no markup, no HTML, no links. Bars are the table's."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(rows: Sequence[Mapping[str, Any]], headers: Sequence[str] | None = None) -> str:
    """A table with a line a row; `headers` are the keys in order, without them those of the first row."""
    headers = list(headers or rows[0])
    return grid(headers, ([escaped(str(row[key])) for key in headers] for row in rows))


def grid(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = False) -> str:
    """A table of cells, each line with its end; with `numbers` all columns but the first are aligned to the right."""
    rule = ["---", *["--:" if numbers else "---"] * (len(headers) - 1)]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in (headers, rule, *rows))


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
