"""Whether what results depend on is what it was when they were begun."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str], message: str) -> None:
    """Raises ValueError, `message` and each difference, unless all `keys` have the value that they had before."""
    changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in keys if before.get(key) != now[key]]
    if changed:
        raise ValueError(f"{message} ({'; '.join(changed)})")
