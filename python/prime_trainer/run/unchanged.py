"""Compares saved settings with the current ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def check(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str], message: str) -> None:
    """Raises ValueError, `message` and each difference, unless all `keys` have the value that they had before."""
    changed = [f"{key}: {before.get(key)} -> {now[key]}" for key in differing(before, now, keys)]
    if changed:
        raise ValueError(f"{message} ({'; '.join(changed)})")


def differing(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str] | None = None) -> list[str]:
    """Those of `keys`, or of all keys of `now`, whose value is not what it was."""
    return [key for key in (now if keys is None else keys) if before.get(key) != now[key]]
