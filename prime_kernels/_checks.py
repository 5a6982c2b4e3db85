"""Input checks of all operations, which run before a backend is called.

Messages read "argument: expected ..., got ...". A wrong type or dtype raises TypeError, a label outside the vocabulary
IndexError, anything else ValueError. Checks of tensor values read CPU tensors directly. On CUDA tensors they are
device-side assertions, so that no check waits for the GPU; inside torch.compile they are assertions in the graph.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype], *, ndim: int | None = None) -> Tensor:
    """``value`` is a tensor of one of ``dtypes``, with ``ndim`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor of {_listed(dtypes)}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {_listed(dtypes)}, got {_listed([value.dtype])}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} dimension{'s' * (ndim != 1)}, got shape {list(value.shape)}")
    return value


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def floating(name: str, value: object, *, ndim: int | None = None) -> Tensor:
    """``value`` is a floating-point tensor of a supported dtype."""
    return tensor(name, value, FLOATS, ndim=ndim)


def shape(name: str, value: Tensor, expected: Sequence[int], source: str) -> None:
    """``value`` has the shape ``expected``, which follows from the argument ``source``."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name}: expected shape {list(expected)} as of {source}, got {list(value.shape)}")


def device(name: str, value: Tensor, other: Tensor, source: str) -> None:
    """``value`` is on the device of ``other``, the argument ``source``."""
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as of {source}, got {value.device}")


def like(name: str, value: Tensor, other: Tensor, source: str) -> None:
    """``value`` has the shape and device of ``other``."""
    shape(name, value, other.shape, source)
    device(name, value, other, source)


def mask(value: object, other: Tensor, source: str, *, name: str = "mask") -> Tensor | None:
    """``value`` is None or a bool tensor with the shape and device of ``other``."""
    if value is None:
        return None
    checked = tensor(name, value, (torch.bool,))
    like(name, checked, other, source)
    return checked


def number(name: str, value: object, low: float, high: float, *, above_low: bool = False) -> float:
    """``value`` is a finite number in [low, high], or in (low, high] with ``above_low``."""
    # A tuple: torch.compile of torch 2.9 does not support int | float here.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not math.isfinite(value) or value < low or value > high or (above_low and value == low):
        left = "(" if above_low or math.isinf(low) else "["
        right = ")" if math.isinf(high) else "]"
        raise ValueError(f"{name}: expected a finite number in {left}{low:g}, {high:g}{right}, got {value}")
    return float(value)


def flag(name: str, value: object) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def choice(name: str, value: object, options: Sequence[str]) -> None:
    """``value`` is one of ``options``."""
    if value not in options:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}")


def offsets(name: str, value: object, total: int | None, unit: str, other: Tensor, source: str) -> Tensor:
    """``value`` holds cumulative offsets 0 <= ... <= total; returned as contiguous int64.

    Args:
        name: the argument.
        value: the offsets, [segments + 1], int32 or int64.
        total: what they must end at, or None if they define it.
        unit: what they count ("tokens"), for the message.
        other: a tensor on the device they must share.
        source: the argument ``other``.
    """
    checked = offsets_unread(name, value, other, source).long().contiguous()
    _require(
        checked[0] == 0,
        lambda: ValueError(f"{name}: expected to start at 0, got {int(checked[0])}"),
        f"{name}: expected to start at 0",
    )
    steps = checked.diff()
    _require(
        (steps >= 0).all(),
        lambda: ValueError(f"{name}: expected non-decreasing offsets, got {_first_drop(checked)}"),
        f"{name}: expected non-decreasing offsets",
    )
    if total is not None:
        ends(name, checked, total, unit)
    return checked


def ends(name: str, checked: Tensor, total: int, unit: str) -> None:
    """Offsets end at ``total``."""
    _require(
        checked[-1] == total,
        lambda: ValueError(f"{name}: expected to end at {total} {unit}, got {int(checked[-1])}"),
        f"{name}: expected to end at {total} {unit}",
    )


def size(name: str, value: object) -> int | None:
    """``value`` is None or a whole number, at least 0; returned."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise TypeError(f"{name}: expected a whole number or None, got {type(value).__name__}")
    if value is not None and value < 0:
        raise ValueError(f"{name}: expected at least 0, got {value}")
    return value


def offsets_unread(name: str, value: object, other: Tensor, source: str) -> Tensor:
    """What :func:`offsets` checks without reading the values; returned as they are."""
    checked = tensor(name, value, INTEGERS, ndim=1)
    device(name, checked, other, source)
    if checked.numel() == 0:
        raise ValueError(f"{name}: expected at least one offset, got shape [0]")
    return checked


def longest(name: str, checked: Tensor, limit: int, what: str) -> None:
    """No segment of checked offsets is longer than ``limit``, which is ``what``."""
    _require(
        (checked.diff() <= limit).all(),
        lambda: ValueError(f"{name}: expected segments of at most {limit} ({what}), got {int(checked.diff().max())}"),
        f"{name}: expected segments of at most {limit} ({what})",
    )


def nested(name: str, inner: Tensor, outer_name: str, outer: Tensor) -> None:
    """No segment of ``inner`` crosses a boundary of ``outer`` (both already checked, with the same end)."""
    position = torch.searchsorted(inner, outer).clamp(max=inner.numel() - 1)
    hit = inner[position] == outer

    def error() -> ValueError:
        boundary = int(outer[~hit][0])
        return ValueError(f"{name}: expected every offset of {outer_name} among its offsets, got none at {boundary}")

    _require(hit.all(), error, f"{name}: expected every offset of {outer_name} among its offsets")


def labels(name: str, ids: Tensor, valid: Tensor | None, vocabulary: int) -> Tensor:
    """Labels at valid positions lie in [0, vocabulary); returned as int64 with masked labels set to 0, unread."""
    ids = ids.long()
    if valid is not None:
        ids = ids.masked_fill(~valid, 0)
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        # Two scalars from one pass: half the time of the comparison below on a few labels.
        if ids.numel() == 0:
            return ids
        lowest, highest = torch.aminmax(ids)
        if lowest.item() >= 0 and highest.item() < vocabulary:
            return ids
    inside = (ids >= 0) & (ids < vocabulary)

    def error() -> IndexError:
        where = (~inside).nonzero()[0].tolist()
        return IndexError(f"{name}: expected labels in [0, {vocabulary}), got {int(ids[tuple(where)])} at {where}")

    _require(inside.all(), error, f"{name}: expected labels in [0, {vocabulary})")
    return ids


def finite(name: str, value: Tensor, valid: Tensor | None = None) -> None:
    """No NaN and no infinity at valid positions."""
    _all(name, value, valid, torch.isfinite, "finite values")


def unit_interval(name: str, value: Tensor) -> None:
    """All values lie in [0, 1]; NaN does not."""
    _all(name, value, None, lambda x: (x >= 0) & (x <= 1), "values in [0, 1]")


def positive(name: str, value: Tensor) -> None:
    """All values are finite and above zero."""
    _all(name, value, None, lambda x: torch.isfinite(x) & (x > 0), "finite values above 0")


def _all(name: str, value: Tensor, valid: Tensor | None, test: Callable[[Tensor], Tensor], expected: str) -> None:
    good = test(value)
    if valid is not None:
        good = good | ~valid

    def error() -> ValueError:
        where = (~good).nonzero()[0].tolist()
        return ValueError(f"{name}: expected {expected}, got {value[tuple(where)].item()} at {where}")

    _require(good.all(), error, f"{name}: expected {expected}")


def _require(condition: Tensor, error: Callable[[], Exception], message: str) -> None:
    if condition.device.type == "cuda" or torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not condition:
        raise error()


def _first_drop(values: Tensor) -> str:
    at = int((values.diff() < 0).nonzero()[0])
    return f"{int(values[at])} then {int(values[at + 1])} at {at + 1}"
