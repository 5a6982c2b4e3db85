"""JSON that keeps what JSON loses: tuples, sets and dictionaries whose keys are not strings.

Scorers compare such values, so a problem that went through plain JSON would be scored wrongly.
"""

from __future__ import annotations

from typing import Any

_TAG = "__python__"


def encode(value: Any) -> Any:
    """Returns `value` with everything JSON cannot hold put in tagged objects; raises TypeError for other types."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list):
        return [encode(v) for v in value]
    if isinstance(value, tuple):
        return {_TAG: "tuple", "items": [encode(v) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {_TAG: "set", "items": [encode(v) for v in sorted(value, key=repr)]}
    if isinstance(value, dict):
        if all(type(k) is str for k in value) and _TAG not in value:
            return {k: encode(v) for k, v in value.items()}
        return {_TAG: "dict", "items": [[encode(k), encode(v)] for k, v in value.items()]}
    if hasattr(value, "tolist"):  # a numpy array or scalar
        return encode(value.tolist())
    if isinstance(value, (bool, int, float, str)):  # an enum or another subclass: its plain value
        base = next(t for t in (bool, int, float, str) if isinstance(value, t))
        return base(value)
    raise TypeError(f"cannot keep a {type(value).__name__} in a problem")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {k: decode(v) for k, v in value.items()}
    items = [decode(v) for v in value["items"]]
    return tuple(items) if kind == "tuple" else set(items) if kind == "set" else {k: v for k, v in items}
