"""JSON that keeps what JSON loses: tuples, sets, complex numbers, long integers, and dictionaries with other keys.

Scorers compare such values, so a problem that went through plain JSON would be scored wrongly. Decoding makes values of
these types alone, whatever it reads.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from typing import Any

_TAG = "__python__"
_BUILD: dict[str, Callable[[list[Any]], Any]] = {
    "tuple": tuple,
    "set": set,
    "iterator": iter,
    "deque": collections.deque,
    "dict": lambda items: {k: v for k, v in items},
    "complex": lambda items: complex(*items),
    "bytes": bytes,
    "int": lambda items: int(items[0], 16),
}
_MAX_PLAIN = 1 << 2_000  # Python refuses to read larger integers than this as decimal text, at some size


def encode(value: Any) -> Any:
    """Returns `value` with everything JSON cannot hold put in tagged objects; raises TypeError for other types."""
    if value is None or type(value) in (bool, float, str):
        return value
    if type(value) is int:
        return value if -_MAX_PLAIN < value < _MAX_PLAIN else {_TAG: "int", "items": [hex(value)]}
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return _tagged("tuple", value)
    if isinstance(value, (set, frozenset)):
        return _tagged("set", sorted(value, key=repr))
    if isinstance(value, dict):
        if all(type(k) is str for k in value) and _TAG not in value:
            return {k: encode(v) for k, v in value.items()}
        return _tagged("dict", [[k, v] for k, v in value.items()])
    if hasattr(value, "tolist"):  # a numpy array or scalar
        return encode(value.tolist())
    if isinstance(value, (bool, int, float, str)):  # an enum or another subclass: its plain value
        base = next(t for t in (bool, int, float, str) if isinstance(value, t))
        return encode(base(value))
    if isinstance(value, complex):
        return _tagged("complex", [value.real, value.imag])
    if isinstance(value, (bytes, bytearray)):
        return _tagged("bytes", value)
    if isinstance(value, collections.deque):
        return _tagged("deque", value)
    if isinstance(value, (Iterator, range)):
        return _tagged("iterator", value)
    raise TypeError(f"cannot keep a {type(value).__name__} in a problem")


def _tagged(kind: str, items: Any) -> dict[str, Any]:
    return {_TAG: kind, "items": [encode(v) for v in items]}


def decode(value: Any) -> Any:
    """The inverse of `encode`; raises ValueError or TypeError for what `encode` never writes."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {k: decode(v) for k, v in value.items()}
    if kind not in _BUILD:
        raise ValueError(f"cannot decode a {kind!r:.40}")
    return _BUILD[kind]([decode(v) for v in value["items"]])
