r"""Decides whether two formulas have the same value.

Rational values are compared exactly. Other values without decimals (roots, \pi, logarithms, powers with large results)
are computed with 60 and with 150 digits: they are equal if their difference vanishes with the precision. Where one side
has a decimal, values are equal within a relative 1e-6 of the reference. Formulas with symbols are compared at several
points in the same way.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any

import mpmath

from .formula import INFINITY, Apply, Node, Number, Symbol

RELATIVE_TOLERANCE = 1e-6
"""Of a comparison with a decimal, by the reference."""
_MAX_BITS = 200_000
_MAX_FACTORIAL = 3_000
_CONSTANTS = {"e", "i", "\\pi", "\\imath"}
Value = Any  # Fraction, mpmath.mpf or mpmath.mpc


class NoValue(ArithmeticError):
    """The formula has no value at this point, or none that can be computed."""


def same(reference: Node, answer: Node) -> bool:
    """Whether two formulas are equal for all values of their symbols."""
    if reference == answer:
        return True
    if INFINITY in _leaves(reference) or INFINITY in _leaves(answer):
        return _infinite(reference) == _infinite(answer) != 0
    decimal = has_decimal(reference) or has_decimal(answer)
    names = symbols(reference) | symbols(answer)
    if not names:
        return _same_at({}, reference, answer, decimal, ()) is True
    found = [_same_at(point, reference, answer, decimal, negative) for point, negative in _points(names)]
    if any(_steps(node) for node in (reference, answer)):  # equal at a few points is not enough where values jump
        wide = ({name: _sample(name, k) * 7 ** (k % 3) for name in names} for k in range(4, 24))
        found += [_same_at(point, reference, answer, decimal, ()) for point in wide]
    return False not in found and found[:3].count(True) >= 2


def symbols(node: Node) -> frozenset[str]:
    return frozenset(leaf.name for leaf in _leaves(node) if isinstance(leaf, Symbol) and leaf.name not in _CONSTANTS)


def has_decimal(node: Node) -> bool:
    return any(isinstance(leaf, Number) and leaf.decimal for leaf in _leaves(node))


def number(node: Node, digits: int = 30) -> Value:
    """The value of a formula without symbols. Raises NoValue."""
    with mpmath.workdps(digits):
        return _evaluate(node, {})


def proportional(reference: Node, answer: Node) -> int:
    """The sign of the constant c != 0 with answer = c * reference at all points; 0 where there is none."""
    names = symbols(reference) | symbols(answer)
    ratios: list[Value] = []
    tolerance = 1e-6 if has_decimal(reference) or has_decimal(answer) else 1e-40
    with mpmath.workdps(60):
        for point, _ in _points(names):
            try:
                mine, theirs = _evaluate(reference, point), _evaluate(answer, point)
                if theirs == 0 or mine == 0:
                    if (theirs == 0) != (mine == 0):
                        return 0
                    continue
                ratios.append(_real(theirs) / _real(mine))
            except (ArithmeticError, ValueError, TypeError):
                continue
        if len(ratios) < 2 or any(abs(r / ratios[0] - 1) > tolerance for r in ratios):
            return 0
    return 1 if ratios[0] > 0 else -1


def within(reference: Node, answer: Node, tolerance: float) -> bool:
    """Whether two real numbers differ by `tolerance` at most, with a hair for the rounding of decimals."""
    try:
        return bool(
            abs(_real(number(reference)) - _real(number(answer))) <= Fraction(tolerance) * (1 + Fraction(1, 10**9))
        )
    except (ArithmeticError, ValueError, TypeError):
        return False


def _leaves(node: Node) -> Iterator[Node]:
    stack = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Apply):
            stack += node.args
        else:
            yield node


def _steps(node: Node) -> bool:
    return isinstance(node, Apply) and (node.name in ("floor", "ceil", "mod") or any(map(_steps, node.args)))


def _infinite(node: Node) -> int:
    """1 or -1 for plus or minus infinity, else 0."""
    if node == INFINITY:
        return 1
    if isinstance(node, Apply) and node.name == "neg":
        return -_infinite(node.args[0])
    return 0


_Point = Mapping[str, Value]


def _points(names: frozenset[str]) -> Iterator[tuple[_Point, tuple[str, ...]]]:
    """Three points of positive rationals, then each of at most six symbols negative in turn."""
    ordered = sorted(names)
    for k in range(3):
        yield {name: _sample(name, k) for name in ordered}, ()
    for negative in ordered[:6]:
        yield {name: _sample(name, 3) * (-1 if name == negative else 1) for name in ordered}, (negative,)


def _sample(name: str, k: int) -> Fraction:
    return Fraction(1000 + zlib.crc32(f"{name} {k}".encode()) % 4001, 1999)


def _same_at(point: _Point, reference: Node, answer: Node, decimal: bool, negative: tuple[str, ...]) -> bool | None:
    """Whether the values at a point are equal; None where they cannot be compared there."""
    try:
        with mpmath.workdps(60):
            mine, theirs = _evaluate(reference, point), _evaluate(answer, point)
            if negative and not (_is_real(mine) and _is_real(theirs)):
                return None  # branches of roots: a symbol that is positive by nature may be meant
            if isinstance(mine, Fraction) and isinstance(theirs, Fraction) and not decimal:
                return mine == theirs
            if decimal:
                return _close(reference, answer, mine, theirs)
            first = abs(_mp(mine) - _mp(theirs))
            if first > mpmath.mpf(10) ** -30 * max(abs(_mp(mine)), abs(_mp(theirs)), _scale(reference, answer)):
                return False
        with mpmath.workdps(150):
            mine, theirs = _mp(_evaluate(reference, point)), _mp(_evaluate(answer, point))
            second = abs(mine - theirs)
            largest = max(abs(mine), abs(theirs))
            return bool(second <= first * mpmath.mpf(10) ** -30 or second <= largest * mpmath.mpf(10) ** -100)
    except (ArithmeticError, ValueError, TypeError):
        return None


def _scale(reference: Node, answer: Node) -> int:
    """1 where a side is a sum and may be zero by cancellation, so that what is left of it may be rounding; else 0."""
    return int(any(isinstance(n, Apply) and n.name == "+" for n in (reference, answer)))


def _close(reference: Node, answer: Node, mine: Value, theirs: Value) -> bool:
    difference, size = abs(_mp(mine) - _mp(theirs)), abs(_mp(mine))
    if difference == 0:
        return True
    tolerance = RELATIVE_TOLERANCE * (1 + 1e-9)
    whole = isinstance(mine, Fraction) and mine.denominator == 1 and not has_decimal(reference)
    if difference <= tolerance * (min(size, 1) if whole else size):
        return True
    # 0.083333 is 1/12: a decimal with six places that was rounded or cut off.
    for written, other in ((answer, reference), (reference, answer)):
        literal = written.args[0] if isinstance(written, Apply) and written.name == "neg" else written
        if isinstance(literal, Number) and literal.decimal and not has_decimal(other) and not whole:
            cut = abs(_mp(literal.value)) < abs(_mp(mine if written is answer else theirs))
            allowed = mpmath.mpf("1e-6") if cut else mpmath.mpf("0.5e-6")
            return size >= mpmath.mpf("0.01") and literal.value.denominator * 10 > 10**6 and bool(difference <= allowed)
    return False


def _is_real(value: Value) -> bool:
    return isinstance(value, (Fraction, mpmath.mpf)) or abs(value.imag) <= abs(value) * mpmath.mpf(10) ** -40


def _real(value: Value) -> Value:
    if isinstance(value, Fraction):
        return value
    if not _is_real(value):
        raise NoValue("not real")
    return value.real if isinstance(value, mpmath.mpc) else value


def _mp(value: Value) -> Value:
    if isinstance(value, Fraction):
        return mpmath.mpf(value.numerator) / mpmath.mpf(value.denominator)
    return value


def _evaluate(node: Node, point: _Point) -> Value:
    if isinstance(node, Number):
        return node.value
    if isinstance(node, Symbol):
        return _named(node.name, point)
    if node.name == "degrees":
        return _evaluate(node.args[0], point)
    if node.name in _TRIGONOMETRIC:
        return _TRIGONOMETRIC[node.name](_angle(node.args[0], point))
    values = [_evaluate(argument, point) for argument in node.args]
    if node.name not in _OPERATIONS:
        raise NoValue(node.name)
    result = _OPERATIONS[node.name](*values)
    if not isinstance(result, Fraction) and not mpmath.isfinite(result):
        raise NoValue("not finite")
    return result


def _angle(node: Node, point: _Point) -> Value:
    """The argument of a trigonometric function in radians."""
    value = _mp(_evaluate(node, point))
    inside = [node]
    while inside:
        part = inside.pop()
        if isinstance(part, Apply):
            if part.name == "degrees":
                return value * mpmath.pi / 180
            inside += part.args
    return value


def _named(name: str, point: _Point) -> Value:
    if name in point:
        return point[name]
    if name == "e":
        return +mpmath.e
    if name == "\\pi":
        return +mpmath.pi
    if name in ("i", "\\imath"):
        return mpmath.mpc(0, 1)
    raise NoValue(name)


def _exact(function: Callable[..., Fraction], inexact: Callable[..., Value]) -> Callable[..., Value]:
    def apply(*values: Value) -> Value:
        if all(isinstance(v, Fraction) for v in values):
            result = function(*values)
            if result.numerator.bit_length() + result.denominator.bit_length() > 8 * _MAX_BITS:
                raise NoValue("too large")
            return result
        return inexact(*map(_mp, values))

    return apply


def _add(*values: Value) -> Value:
    total = values[0]
    for value in values[1:]:
        total = _PLUS(total, value)
    return total


_PLUS = _exact(lambda a, b: a + b, lambda a, b: a + b)


def _divide(a: Value, b: Value) -> Value:
    if b == 0:
        raise NoValue("division by zero")
    return _exact(lambda x, y: x / y, lambda x, y: x / y)(a, b)


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            bits = max(base.numerator.bit_length(), base.denominator.bit_length())
            if base in (0, 1, -1):
                bits = 1
                exponent = exponent if base == 0 else exponent % 2 + 2
            if bits * abs(exponent.numerator) <= _MAX_BITS:
                if base == 0 and exponent <= 0:
                    raise NoValue("a power of zero")
                return base ** int(exponent)
            raise NoValue("too large")
        root = _exact_root(base, exponent)
        if root is not None:
            return root
        if base < 0 and exponent.denominator % 2 == 1:  # the real root: \sqrt[3]{-8} is -2
            value = _mp(-base) ** _mp(exponent)
            return -value if exponent.numerator % 2 else value
    mine, theirs = _mp(base), _mp(exponent)
    if abs(theirs) > 10**8 and mine != 1:
        raise NoValue("too large")
    if mine == 0:
        raise NoValue("a power of zero")
    return mine**theirs


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction | None:
    """`base ** exponent` where it is rational."""
    degree = exponent.denominator
    if base <= 0 or degree > 64 or abs(exponent.numerator) > 64 or base.numerator.bit_length() > 4_000:
        return None
    parts = [_integer_root(part, degree) for part in (base.numerator, base.denominator)]
    if parts[0] is None or parts[1] is None:
        return None
    return Fraction(parts[0], parts[1]) ** exponent.numerator


def _integer_root(value: int, degree: int) -> int | None:
    if degree == 2:
        root = math.isqrt(value)
    else:
        with mpmath.workdps(value.bit_length() // 3 + 20):
            root = int(mpmath.nint(mpmath.root(value, degree)))
    return root if root**degree == value else None


def _sqrt(value: Value) -> Value:
    return _power(value, Fraction(1, 2)) if value != 0 else Fraction(0)


def _whole(value: Value, limit: int) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= limit:
        raise NoValue("no whole number")
    return int(value)


@lru_cache(maxsize=64)
def _factorial(n: int) -> Fraction:
    return Fraction(math.factorial(n))


def _gamma(value: Value) -> Value:
    if isinstance(value, Fraction) and value.denominator == 1:
        return _factorial(_whole(value, _MAX_FACTORIAL))
    return mpmath.gamma(_mp(value) + 1)


def _double_factorial(value: Value) -> Value:
    return Fraction(math.prod(range(_whole(value, _MAX_FACTORIAL), 0, -2)))


def _binomial(n: Value, k: Value) -> Value:
    if isinstance(n, Fraction) and isinstance(k, Fraction) and n.denominator == k.denominator == 1:
        return Fraction(math.comb(_whole(n, 10_000), _whole(k, 10_000)))
    return mpmath.binomial(_mp(n), _mp(k))


def _log(value: Value, base: Value | None = None) -> Value:
    if value == 0 or base in (0, 1):
        raise NoValue("a logarithm of zero")
    return mpmath.log(_mp(value)) if base is None else mpmath.log(_mp(value)) / mpmath.log(_mp(base))


def _exp(value: Value) -> Value:
    if abs(_mp(value)) > 10**8:
        raise NoValue("too large")
    return mpmath.exp(_mp(value))


def _round(exact: Callable[[Fraction], int], inexact: Callable[[Value], Value]) -> Callable[[Value], Value]:
    return lambda value: Fraction(exact(value) if isinstance(value, Fraction) else int(inexact(_real(value))))


def _modulo(a: Value, b: Value) -> Value:
    if not isinstance(a, Fraction) or not isinstance(b, Fraction) or b == 0:
        raise NoValue("no remainder")
    return a % b


_TRIGONOMETRIC: dict[str, Callable[[Value], Value]] = {
    name: getattr(mpmath, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")
}
_OPERATIONS: dict[str, Callable[..., Value]] = {
    "+": _add,
    "*": _exact(lambda a, b: a * b, lambda a, b: a * b),
    "/": _divide,
    "^": _power,
    "neg": lambda a: -a,
    "abs": abs,
    "sqrt": _sqrt,
    "!": _gamma,
    "!!": _double_factorial,
    "binom": _binomial,
    "mod": _modulo,
    "floor": _round(math.floor, mpmath.floor),
    "ceil": _round(math.ceil, mpmath.ceil),
    "ln": _log,
    "log": _log,
    "exp": _exp,
    **{f"{p}{n}": getattr(mpmath, f"a{n}") for n in ("sin", "cos", "tan", "cot") for p in ("arc", "a")},
    **{name: getattr(mpmath, name) for name in ("sinh", "cosh", "tanh", "coth")},
}  # fmt: skip
for _name in ("arcsin", "arccos", "arctan", "arccot", "asin", "acos", "atan", "acot", "sinh", "cosh", "tanh", "coth"):
    _OPERATIONS[_name] = (lambda f: lambda a: f(_mp(a)))(_OPERATIONS[_name])
