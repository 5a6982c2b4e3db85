r"""Whether an answer is the reference, by their structure. The rules:

* a value is the reference's by `numbers.same`; percent may be written or left out (`5\%` is 5 and is 0.05);
* a unit may be missing; two known units must be the same;
* a bare list and a set have no order; a tuple has one, and a bare list may stand for it; a set is no tuple;
* `x = 5` is 5 where one side alone names x; in a chain (`2 + 3 = 5`) all numbers must agree, an approximation may
  follow;
* equations and inequalities are the same up to a constant factor;
* an interval, its inequality, and unions of both are the same set, unless `interval_as_inequality` is off;
* in lists with dots every item that is written must agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from . import numbers, units
from .formula import INFINITY, Apply, Node, Number, Symbol
from .real_sets import LINE, ORDER, cut, infinite, intersection, interval_of, joined
from .structure import (
    Based,
    Collection,
    Difference,
    Dots,
    Interval,
    Matrix,
    NamedSet,
    Raw,
    Relation,
    Scalar,
    Thing,
    Union,
    Words,
)
from .tokens import Unreadable

_EQUALS = frozenset(("=", "\\approx", "\\equiv", "\\sim"))
_MAX_UNORDERED = 60


@dataclass(frozen=True)
class Options:
    tolerance: float | None = None
    """Absolute, for numbers; None where the reference gives none."""
    interval_as_inequality: bool = True


def equal(reference: Thing, answer: Thing, options: Options) -> bool:
    """Whether the answer is the reference. Raises Unreadable where that cannot be decided by structure."""
    return _Comparison(options).equal(reference, answer)


class _Comparison:
    def __init__(self, options: Options) -> None:
        self.options = options

    def equal(self, reference: Thing, answer: Thing) -> bool:
        if reference == answer:
            return True
        if isinstance(reference, Raw) or isinstance(answer, Raw):
            raise Unreadable("a part could not be read")
        if isinstance(reference, Dots) or isinstance(answer, Dots):
            return False
        if isinstance(reference, Relation) and isinstance(answer, Relation):
            return self.relations(reference, answer)
        if isinstance(answer, Relation):
            return self.stated(reference, answer)
        if isinstance(reference, Relation):
            return self.named(reference, answer)
        return self.values(reference, answer)

    def values(self, reference: Thing, answer: Thing) -> bool:
        if isinstance(reference, Words) or isinstance(answer, Words):
            return self.words(reference, answer)
        if isinstance(reference, Scalar) and isinstance(answer, Scalar):
            return self.scalars(reference, answer)
        if isinstance(reference, Based) or isinstance(answer, Based):
            return self.based(reference, answer)
        if isinstance(reference, Matrix) and isinstance(answer, Matrix):
            shapes = [[len(row) for row in m.rows] for m in (reference, answer)]
            return shapes[0] == shapes[1] and all(
                self.equal(a, b)
                for mine, theirs in zip(reference.rows, answer.rows, strict=True)
                for a, b in zip(mine, theirs, strict=True)
            )
        if isinstance(reference, Collection) and isinstance(answer, Collection):
            found = self.collections(reference, answer)
            if found is not None:
                return found
        mine, theirs = self.as_set(reference), self.as_set(answer)
        if mine is not None and theirs is not None:
            return self.sets(mine, theirs)
        return self.single(reference, answer)

    def words(self, reference: Thing, answer: Thing) -> bool:
        texts = [_spelled(thing) for thing in (reference, answer)]
        return texts[0] is not None and texts[0] == texts[1]

    def scalars(self, reference: Scalar, answer: Scalar) -> bool:
        if units.differ(reference.unit, answer.unit):
            return False
        if reference.introduction and answer.introduction and reference.introduction != answer.introduction:
            return False
        nodes = [(reference.node, answer.node)]
        if answer.percent and not reference.percent:
            nodes.append((reference.node, _hundredth(answer.node)))
        elif reference.percent and not answer.percent:
            nodes.append((_hundredth(reference.node), answer.node))
        return any(self.same(mine, theirs) for mine, theirs in nodes)

    def same(self, reference: Node, answer: Node) -> bool:
        if self.options.tolerance is not None and numbers.within(reference, answer, self.options.tolerance):
            return True
        return numbers.same(reference, answer)

    def based(self, reference: Thing, answer: Thing) -> bool:
        """The digits count; the base may be left out."""
        mine, theirs = _digits(reference), _digits(answer)
        if mine is None or theirs is None or mine.digits != theirs.digits:
            return False
        return "" in (mine.base, theirs.base) or mine.base == theirs.base

    def single(self, reference: Thing, answer: Thing) -> bool:
        """A set, or a ratio, of one value is that value."""
        for one, other, forward in ((reference, answer, True), (answer, reference, False)):
            if isinstance(one, Collection) and isinstance(other, Scalar):
                if one.kind in ("set", "list") and len(one.items) == 1:
                    return self.equal(one.items[0], other) if forward else self.equal(other, one.items[0])
                if one.kind == "ratio" and len(one.items) == 2:
                    quotient = _quotient(one)
                    return quotient is not None and self.same(
                        *((quotient, other.node) if forward else (other.node, quotient))
                    )
        return False

    def collections(self, reference: Collection, answer: Collection) -> bool | None:
        bare = ("list", "or")
        if reference.kind == "ratio" or answer.kind == "ratio":
            if reference.kind != answer.kind or len(reference.items) != len(answer.items):
                return False
            if len(reference.items) == 2:
                pair = _quotient(reference), _quotient(answer)
                return pair[0] is not None and pair[1] is not None and self.same(pair[0], pair[1])
            return _same_ratio(reference.items, answer.items)
        if _inequalities(reference) or _inequalities(answer):
            return None
        kinds = reference.kind, answer.kind
        dotted = any(isinstance(i, Dots) for i in (*reference.items, *answer.items))
        if dotted:
            same_kind = ("tuple" in kinds) == (answer.kind == reference.kind == "tuple") or set(kinds) <= {*bare, "set"}
            return same_kind and self.ordered(reference.items, answer.items)
        if kinds[0] in (*bare, "set") and kinds[1] in (*bare, "set"):
            return self.unordered(reference.items, answer.items)
        if "set" in kinds:
            return False
        if kinds[0] == kinds[1] or (kinds[0] in bare) != (kinds[1] in bare):
            mine, theirs = _by_name(reference.items), _by_name(answer.items)
            if "square" in kinds and kinds[0] != kinds[1]:
                return False
            if (mine is None) != (theirs is None):
                return self.ordered(mine or reference.items, theirs or answer.items)
            return self.ordered(reference.items, answer.items)
        return False

    def ordered(self, reference: Sequence[Thing], answer: Sequence[Thing]) -> bool:
        return len(reference) == len(answer) and all(map(self.equal, reference, answer))

    def unordered(self, reference: Sequence[Thing], answer: Sequence[Thing]) -> bool:
        if len(reference) != len(answer):
            return False
        if len(reference) > _MAX_UNORDERED:
            return self.ordered(reference, answer)
        left = list(answer)
        for item in reference:
            place = next((k for k, other in enumerate(left) if self.equal(item, other)), None)
            if place is None:
                return False
            del left[place]
        return True

    # Relations

    def relations(self, reference: Relation, answer: Relation) -> bool:
        if set(reference.operators) <= _EQUALS and set(answer.operators) <= _EQUALS:
            return self.equations(reference, answer)
        if "\\in" in (*reference.operators[:1], *answer.operators[:1]):
            if not self.names(reference, answer):
                return False
            sides = [r.sides[-1] if r.operators == ("\\in",) else r for r in (reference, answer)]
            return self.equal(*sides)
        mine, theirs = self.as_set(reference), self.as_set(answer)
        comparable = mine is not None and theirs is not None and self.names(reference, answer)
        if comparable and self.sets(mine or [], theirs or []):
            return True
        return self.proportional(reference, answer)

    def names(self, reference: Relation, answer: Relation) -> bool:
        """Whether two relations are about the same symbol, or one does not say."""
        mine, theirs = _subject(reference), _subject(answer)
        return mine is None or theirs is None or mine == theirs

    def equations(self, reference: Relation, answer: Relation) -> bool:
        values = self.candidates(answer)
        first = reference.sides[0], answer.sides[0]
        if all(map(_is_name, first)) and self.same_name(*first):
            return any(self.equal(mine, v) for mine in self.candidates(reference) for v in values)
        return bool(values) and self.proportional(reference, answer)

    def same_name(self, reference: Thing, answer: Thing) -> bool:
        if isinstance(reference, Raw) or isinstance(answer, Raw):
            return reference == answer
        return self.values(reference, answer)

    def proportional(self, reference: Relation, answer: Relation) -> bool:
        """Whether the differences of the sides are the same up to a factor; a negative one turns an inequality."""
        sides = [*reference.sides, *answer.sides]
        if len(sides) != 4 or not all(isinstance(side, Scalar) for side in sides):
            if any(isinstance(side, Raw) for side in sides):
                raise Unreadable("a relation that could not be read")
            return False
        nodes = [side.node for side in sides if isinstance(side, Scalar)]
        differences = [_minus(nodes[0], nodes[1]), _minus(nodes[2], nodes[3])]
        sign = numbers.proportional(*differences)
        mine, theirs = reference.operators[0], answer.operators[0]
        if mine in ORDER:
            return (theirs == mine and sign > 0) or (theirs == ORDER[mine] and sign < 0)
        return sign != 0 and (mine == theirs or {mine, theirs} <= _EQUALS)

    def candidates(self, relation: Relation) -> list[Thing]:
        """What an equation states: its last side, and the one before an approximation; nothing if it is false."""
        sides = [side for side in relation.sides if side != Raw(())]
        scalars = [s for s in sides if isinstance(s, Scalar) and not numbers.symbols(s.node)]
        if not _is_name(relation.sides[0]) or len(sides) > 2:
            for first, second in itertools.pairwise(scalars):
                if not (self.scalars(first, second) or ("\\approx" in relation.operators and _near(first, second))):
                    return []
        values = [sides[-1]]
        if "\\approx" in relation.operators:
            place = relation.operators.index("\\approx")
            if place or not _is_name(relation.sides[0]):
                values.append(relation.sides[place])
        return values

    def stated(self, reference: Thing, answer: Relation) -> bool:
        """An answer that is a relation, for a reference that is none."""
        if set(answer.operators) <= _EQUALS:
            return any(self.equal(reference, value) for value in self.candidates(answer))
        if answer.operators == ("\\in",):
            return self.equal(reference, answer.sides[1])
        if not self.options.interval_as_inequality:
            return False
        mine, theirs = self.as_set(reference), self.as_set(answer)
        return mine is not None and theirs is not None and self.sets(mine, theirs)

    def named(self, reference: Relation, answer: Thing) -> bool:
        """A reference that is a relation, for an answer that is none: the name of the value may be left out."""
        if set(reference.operators) <= _EQUALS:
            if not _is_name(reference.sides[0]):
                return False
            return any(self.equal(value, answer) for value in self.candidates(reference))
        if reference.operators == ("\\in",):
            return self.equal(reference.sides[1], answer)
        if not self.options.interval_as_inequality:
            return False
        mine, theirs = self.as_set(reference), self.as_set(answer)
        return mine is not None and theirs is not None and self.sets(mine, theirs)

    # Sets of real numbers

    def as_set(self, thing: Thing) -> list[Interval] | None:
        """The intervals of a set as they are written, points as closed ones; None for what is no such set."""
        if isinstance(thing, Interval):
            return [thing]
        if isinstance(thing, NamedSet):
            return {"R": [LINE], "empty": []}.get(thing.name)
        if isinstance(thing, Union):
            parts = [self.as_set(part) for part in thing.parts]
            return None if None in parts else [piece for part in parts if part for piece in part]
        if isinstance(thing, Difference):
            return self.without(self.as_set(thing.base), self.as_set(thing.removed))
        if isinstance(thing, Relation):
            if thing.operators == ("\\in",):
                return self.as_set(thing.sides[1])
            return interval_of(thing) if self.options.interval_as_inequality else None
        if isinstance(thing, Collection):
            return self.collection_as_set(thing)
        return None

    def collection_as_set(self, thing: Collection) -> list[Interval] | None:
        if thing.kind in ("tuple", "square") and len(thing.items) == 2:
            low, high = thing.items
            if isinstance(low, Scalar) and isinstance(high, Scalar):
                return [Interval(low.node, high.node, thing.kind == "tuple", thing.kind == "tuple")]
        if thing.kind == "set" and all(isinstance(item, Scalar) for item in thing.items):
            return [Interval(i.node, i.node, False, False) for i in thing.items if isinstance(i, Scalar)]
        if thing.kind in ("list", "or") and self.options.interval_as_inequality:
            parts = [self.as_set(item) for item in thing.items if not isinstance(item, Scalar)]
            if len(parts) == len(thing.items) and None not in parts and _one_subject(thing):
                pieces = [piece for part in parts if part for piece in part]
                both = intersection(pieces) if thing.kind == "list" and len(pieces) == 2 else None
                return pieces if both is None else [both]
        return None

    def without(self, base: list[Interval] | None, removed: list[Interval] | None) -> list[Interval] | None:
        if base is None or removed is None:
            return None
        for point in removed:
            if not numbers.same(point.low, point.high):
                return None
            base = [part for piece in base for part in cut(piece, point.low)]
        return base

    def sets(self, reference: list[Interval], answer: list[Interval]) -> bool:
        left = joined(answer)
        reference = joined(reference)
        if len(reference) != len(left):
            return False
        for piece in reference:
            place = next((k for k, other in enumerate(left) if self.intervals(piece, other)), None)
            if place is None:
                return False
            del left[place]
        return True

    def intervals(self, reference: Interval, answer: Interval) -> bool:
        open_ends = [(i.left_open or infinite(i.low), i.right_open or infinite(i.high)) for i in (reference, answer)]
        return (
            open_ends[0] == open_ends[1]
            and self.same(reference.low, answer.low)
            and self.same(reference.high, answer.high)
        )


def _spelled(thing: Thing) -> str | None:
    if isinstance(thing, Words):
        return thing.text
    if isinstance(thing, Scalar):
        return _letters_of(thing.node)
    return {"empty": "nosolution", "R": "allrealnumbers"}.get(thing.name) if isinstance(thing, NamedSet) else None


def _letters_of(node: Node) -> str | None:
    """The word that a product of letters spells."""
    if isinstance(node, Symbol):
        return node.name
    if isinstance(node, Apply) and node.name == "*":
        parts = [_letters_of(argument) for argument in node.args]
        return None if None in parts else "".join(filter(None, parts)).casefold()
    return None


def _digits(thing: Thing) -> Based | None:
    if isinstance(thing, Scalar) and isinstance(thing.node, Number) and thing.node.value.denominator == 1:
        return Based(str(thing.node.value), "")
    return thing if isinstance(thing, Based) else None


def _hundredth(node: Node) -> Node:
    return Apply("/", (node, Number(Fraction(100))))


def _minus(a: Node, b: Node) -> Node:
    return Apply("+", (a, Apply("neg", (b,))))


def _quotient(ratio: Collection) -> Node | None:
    above, below = ratio.items
    return Apply("/", (above.node, below.node)) if isinstance(above, Scalar) and isinstance(below, Scalar) else None


def _same_ratio(reference: Sequence[Thing], answer: Sequence[Thing]) -> bool:
    mine, theirs = ([item.node for item in items if isinstance(item, Scalar)] for items in (reference, answer))
    return len(mine) == len(theirs) == len(reference) == len(answer) and all(
        numbers.same(Apply("*", (a, theirs[0])), Apply("*", (b, mine[0]))) for a, b in zip(mine, theirs, strict=True)
    )


def _inequalities(thing: Collection) -> bool:
    return all(isinstance(item, Relation) and not set(item.operators) <= _EQUALS for item in thing.items)


def _by_name(items: Sequence[Thing]) -> tuple[Thing, ...] | None:
    """The values of a system of assignments (`y=2, x=1`) in the order of the names; None for what is none."""
    found: dict[str, Thing] = {}
    for item in items:
        if not isinstance(item, Relation) or item.operators != ("=",) or (name := _subject(item)) is None:
            return None
        found[name] = item.sides[1]
    return tuple(found[name] for name in sorted(found)) if len(found) == len(items) > 1 else None


def _is_name(thing: Thing) -> bool:
    """Whether the left side of an equation names what the right side is: x, f(x), AB, a word, (x, y)."""
    if isinstance(thing, (Words, Raw)):
        return thing != Raw(())
    if isinstance(thing, Collection):
        return all(map(_is_name, thing.items))
    return isinstance(thing, Scalar) and _only_symbols(thing.node)


def _only_symbols(node: Node) -> bool:
    if isinstance(node, Apply):
        return node.name in ("*", "abs", "/") and all(map(_only_symbols, node.args))
    return isinstance(node, Symbol) and node != INFINITY


def _subject(relation: Relation) -> str | None:
    """The symbol that a relation is about, where it stands alone on one side."""
    for side in relation.sides:
        if isinstance(side, Scalar) and isinstance(side.node, Symbol) and side.node != INFINITY:
            return side.node.name
    return None


def _one_subject(thing: Collection) -> bool:
    return len({_subject(item) for item in thing.items if isinstance(item, Relation)}) <= 1


def _near(first: Scalar, second: Scalar) -> bool:
    try:
        a, b = numbers.number(first.node), numbers.number(second.node)
        return bool(abs(a - b) <= abs(a) / 100)
    except (ArithmeticError, ValueError, TypeError):
        return True
