r"""Sets of real numbers as intervals: what inequalities, unions and differences say."""

from __future__ import annotations

from collections.abc import Sequence

from . import numbers
from .formula import INFINITY, Apply, Node, Symbol
from .structure import Interval, Relation, Scalar

ORDER = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
LINE = Interval(Apply("neg", (INFINITY,)), INFINITY, True, True)


def infinite(node: Node) -> bool:
    return INFINITY in (node, *(node.args if isinstance(node, Apply) else ()))


def interval_of(relation: Relation) -> list[Interval] | None:
    """`x < 3`, `3 > x` and `1 <= x < 3` as intervals, `x \\ne 1` as two; None for other relations."""
    sides = [side.node for side in relation.sides if isinstance(side, Scalar)]
    if len(sides) != len(relation.sides):
        return None
    bare = [isinstance(s, Symbol) and s != INFINITY and s.name not in ("e", "\\pi", "i") for s in sides]
    operators = relation.operators
    if operators == ("\\ne",) and bare[0]:
        return cut(LINE, sides[1])
    if not set(operators) <= set(ORDER):
        return None
    if (
        len(sides) == 2
        and isinstance(sides[0], Apply)
        and sides[0].name == "abs"
        and isinstance(sides[0].args[0], Symbol)
    ):
        bound, strict = sides[1], operators[0] in ("<", ">")
        below = Apply("neg", (bound,))
        if operators[0] in ("<", "\\le"):
            return [Interval(below, bound, strict, strict)]
        return [Interval(LINE.low, below, True, strict), Interval(bound, LINE.high, strict, True)]
    low, high = LINE.low, LINE.high
    left_open = right_open = True
    if (len(sides) == 2 and bare[0] != bare[1]) or (len(sides) == 2 and bare[0]):
        operator, bound = (operators[0], sides[1]) if bare[0] else (ORDER[operators[0]], sides[0])
        if operator in ("<", "\\le"):
            high, right_open = bound, operator == "<"
        else:
            low, left_open = bound, operator == ">"
        return [Interval(low, high, left_open, right_open)]
    if len(sides) == 3 and bare[1]:
        if {*operators} <= {"<", "\\le"}:
            return [Interval(sides[0], sides[2], operators[0] == "<", operators[1] == "<")]
        if {*operators} <= {">", "\\ge"}:
            return [Interval(sides[2], sides[0], operators[1] == ">", operators[0] == ">")]
    return None


def _by_absolute_value(inside: Node, operator: str, bound: Node) -> list[Interval] | None:
    """`|x| < 2` and `|x| > 2`."""
    if not isinstance(inside, Symbol):
        return None
    below, strict = Apply("neg", (bound,)), operator in ("<", ">")
    if operator in ("<", "\\le"):
        return [Interval(below, bound, strict, strict)]
    return [Interval(LINE.low, below, True, strict), Interval(bound, LINE.high, strict, True)]


def _position(node: Node) -> float | None:
    """The place of an end on the line; None where it depends on symbols."""
    if infinite(node):
        return float("inf") if node == INFINITY else float("-inf")
    try:
        return float(numbers.number(node))
    except (ArithmeticError, ValueError, TypeError):
        return None


def cut(piece: Interval, point: Node) -> list[Interval]:
    low, high, place = _position(piece.low), _position(piece.high), _position(point)
    if low is None or high is None or place is None or not low < place < high:
        inside = low is not None and high is not None and place is not None
        return [piece] if inside or piece is not LINE else [
            Interval(piece.low, point, True, True), Interval(point, piece.high, True, True)
        ]  # fmt: skip
    return [Interval(piece.low, point, piece.left_open, True), Interval(point, piece.high, True, piece.right_open)]


def intersection(pieces: Sequence[Interval]) -> Interval | None:
    """Of two half-lines that overlap; None otherwise."""
    first, second = pieces
    ends = [_position(end) for end in (first.low, first.high, second.low, second.high)]
    if None in ends:
        return None
    a, b, c, d = (end for end in ends if end is not None)
    if max(a, c) >= min(b, d):
        return None
    left, right = (first if a >= c else second), (first if b <= d else second)
    return Interval(left.low, right.high, left.left_open, right.right_open)


def joined(pieces: Sequence[Interval]) -> list[Interval]:
    """Without pieces that are empty; those that touch at an end that belongs to one of them are one."""
    placed = [(_position(p.low), _position(p.high), p) for p in pieces]
    if any(low is None or high is None for low, high, _ in placed):
        return list(pieces)
    found: list[Interval] = []
    for low, high, piece in sorted(placed, key=lambda entry: (entry[0], entry[1])):
        last = found[-1] if found else None
        if last is not None and numbers.same(last.high, piece.low) and not (last.right_open and piece.left_open):
            found[-1] = Interval(last.low, piece.high, last.left_open, piece.right_open)
        elif low is not None and high is not None and low <= high:
            found.append(piece)
    return found
