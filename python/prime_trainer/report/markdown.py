"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

# Of brackets those of links alone, of underlines those that are not inside a word: tables are read as text, too.
_SPECIAL = re.compile(r"([\\`*<>|~&]|\](?=[(\[:])|(?<!\w)_|_(?!\w))")


def escaped(text: str) -> str:
    """Text in one line that Markdown shows as it is: no markup, no HTML, no links."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def table(rows: Sequence[Mapping[str, Any]], headers: Sequence[str] | None = None) -> str:
    """A table with a line a row; `headers` are the keys in order, without them those of the first row."""
    headers = list(headers or rows[0])
    lines = [headers, ["---"] * len(headers)]
    lines += [[escaped(str(row[key])) for key in headers] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
