r"""Reads a normalized answer: a value with its unit, words, a list, tuple, set, interval, matrix or relation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import formula, units
from .formula import Node, Symbol
from .normalize import canonical
from .tokens import MAX_DEPTH, Token, TooLarge, Unreadable, tokenize

RELATIONS = frozenset(("=", "<", ">", "\\le", "\\ge", "\\ne", "\\approx", "\\in", "\\equiv", "\\sim", "\\to", "\\iff"))
_OPENING = frozenset(("(", "[", "{", "\\{", "\\langle"))
_CLOSING = frozenset((")", "]", "}", "\\}", "\\rangle"))
_MATRICES = frozenset(("matrix", "pmatrix", "bmatrix", "Bmatrix", "smallmatrix", "array"))
_ROWS = frozenset(("cases", "aligned", "align", "align*", "gathered", "split", "dcases"))


@dataclass(frozen=True)
class Words:
    """Text without case, spaces and punctuation; `plain` if no command said that it is text."""

    text: str
    plain: bool = False


@dataclass(frozen=True)
class Scalar:
    """One value. `introduction`: the words before it, which count where the reference has others."""

    node: Node
    percent: bool = False
    unit: units.Unit | None = None
    introduction: str = ""


@dataclass(frozen=True)
class Based:
    """Digits with their base as a subscript: `1010_2`."""

    digits: str
    base: str


@dataclass(frozen=True)
class Collection:
    """`kind`: `list` (bare), `or` (bare, alternatives), `tuple`, `square` (in brackets), `set` or `ratio`."""

    kind: str
    items: tuple[Thing, ...]


@dataclass(frozen=True)
class Interval:
    low: Node
    high: Node
    left_open: bool
    right_open: bool


@dataclass(frozen=True)
class Union:
    parts: tuple[Thing, ...]


@dataclass(frozen=True)
class Difference:
    base: Thing
    removed: Thing


@dataclass(frozen=True)
class NamedSet:
    """`\\mathbb{R}` and the like, or the empty set (`empty`)."""

    name: str


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Thing, ...], ...]


@dataclass(frozen=True)
class Relation:
    """`sides` is one longer than `operators`; a side that is no value is Raw."""

    sides: tuple[Thing, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Dots:
    """The dots of a list whose middle is left out."""


@dataclass(frozen=True)
class Raw:
    """What could not be read, as its tokens; equal to the same tokens alone. Empty where nothing is written."""

    tokens: tuple[str, ...]


Thing = Words | Scalar | Based | Collection | Interval | Union | Difference | NamedSet | Matrix | Relation | Dots | Raw


def read(normalized: str) -> Thing:
    """Raises Unreadable where a part is no formula."""
    option = _OPTION.fullmatch(re.sub(r"\\text\s*|[{}]", "", normalized).strip())
    if option:
        return Scalar(Symbol(option[1]))
    words = _plain_words(normalized)
    if words:
        return words
    turned = re.fullmatch(r"\](.*)\[", normalized)  # the French open interval
    text = f"({turned[1]})" if turned else normalized
    return _read(tokenize(units.mark(text)), 0)


_IS_WORD = re.compile(
    r"[A-Za-z]{4}|(?<![A-Za-z])(?:[Yy]es|YES|[Nn]o|NO|[Oo]dd|ODD|DNE|[Aa]ll|[Tt]wo|[Oo]ne)(?![A-Za-z])"
)
_OPTION = re.compile(r"(?:the\s+)?(?:option|choice|answer)\s*\(?([A-J])\)?", re.IGNORECASE)
_PLAIN_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")


def _plain_words(text: str) -> Words | None:
    if _PLAIN_WORDS.fullmatch(text) and _IS_WORD.search(text):
        return Words(_letters(text), plain=True)
    return None


def _letters(text: str) -> str:
    """Letters and digits alone; without case unless there is a single letter."""
    found = re.sub(r"\\[A-Za-z]+|[^A-Za-z0-9]", "", text)
    return found if len(found) == 1 else found.casefold()


def _read(tokens: Sequence[Token], depth: int, listed: bool = False) -> Thing:
    if depth > MAX_DEPTH // 2:
        raise TooLarge("too deep")
    tokens = _unbraced(tokens)
    if not tokens:
        return Raw(())
    if len(tokens) == 1 and tokens[0].kind == "environment":
        return _environment(tokens[0].value, depth)
    if all(token.kind == "text" for token in tokens):
        return _words(tokens, depth)
    if not listed:
        parts, alternatives = _split_list(tokens)
        if len(parts) > 1:
            items = tuple(item for part in parts for item in _flat(_read(part, depth + 1, listed=True)))
            items = tuple(item for item in items if not _declares_parameter(item) and item != Raw(()))
            return items[0] if len(items) == 1 else Collection("or" if alternatives else "list", items)
    if any(token.value == "\\dots" for token in tokens) and len(tokens) == 1:
        return Dots()
    if any(token.value in ("\\pm", "\\mp") for token in tokens):
        return Collection("list", tuple(_read(signs, depth + 1, listed) for signs in _both_signs(tokens)))
    sides, operators = _split(tokens, RELATIONS)
    if operators:
        return Relation(tuple(_side(side, depth) for side in sides), tuple(operators))
    for operator in ("\\cup", "\\setminus"):
        parts, found = _split(tokens, {operator})
        if found:
            things = tuple(_read(part, depth + 1) for part in parts)
            return Union(things) if operator == "\\cup" else Difference(things[0], Union(things[1:]))
    parts, found = _split(tokens, {":"})
    if found:
        return Collection("ratio", tuple(_read(part, depth + 1) for part in parts))
    return _bracketed(tokens, depth) or _scalar(tokens)


def _unbraced(tokens: Sequence[Token]) -> Sequence[Token]:
    while len(tokens) > 1 and tokens[0].value == "{" and _closing_of_first(tokens) == len(tokens) - 1:
        if any(token.value == "\\choose" for token in tokens):
            break
        tokens = tokens[1:-1]
    return tokens


def _flat(thing: Thing) -> Iterator[Thing]:
    if isinstance(thing, Collection) and thing.kind in ("list", "or"):
        yield from thing.items
    else:
        yield thing


def _side(tokens: Sequence[Token], depth: int) -> Thing:
    try:
        return _read(tokens, depth + 1)
    except Unreadable:
        return Raw(tuple(token.value for token in tokens))


def _words(tokens: Sequence[Token], depth: int) -> Thing:
    text = " ".join(token.value for token in tokens).strip()
    if not re.search("[A-Za-z]{2}|[A-Za-z] [A-Za-z]", text) and re.search(r"\d", text):
        return _read(tokenize(text.replace("$", "")), depth + 1)  # \text{13}
    return Words(_letters(text))


def _depths(tokens: Sequence[Token]) -> Iterator[tuple[Token, int]]:
    depth = 0
    for token in tokens:
        structural = token.kind not in ("text", "environment")
        if structural and token.value in _CLOSING:
            depth -= 1
        yield token, depth
        if structural and token.value in _OPENING:
            depth += 1


def _closing_of_first(tokens: Sequence[Token]) -> int:
    for place, (token, depth) in enumerate(_depths(tokens)):
        if place and depth == 0 and token.kind not in ("text", "environment") and token.value in _CLOSING:
            return place
    return -1


def _split(tokens: Sequence[Token], at: frozenset[str] | set[str]) -> tuple[list[list[Token]], list[str]]:
    """The parts between tokens `at` outside of brackets, and those tokens."""
    parts: list[list[Token]] = [[]]
    found: list[str] = []
    for token, depth in _depths(tokens):
        if depth == 0 and token.kind != "text" and token.value in at:
            parts.append([])
            found.append(token.value)
        else:
            parts[-1].append(token)
    return parts, found


_JOINERS = {"and": False, "or": True, "": False, "and/or": True}


def _split_list(tokens: Sequence[Token]) -> tuple[list[list[Token]], bool]:
    """The items of a bare list, and whether they are joined by "or"."""
    parts: list[list[Token]] = [[]]
    alternatives = False
    for token, depth in _depths(tokens):
        word = token.value.strip(" ,;.").lower() if token.kind == "text" else None
        joiner = word in _JOINERS and (word != "" or any(c in token.value for c in ",;"))
        if depth == 0 and (joiner or token.value in ("\\lor", "\\vee", "\\land", "\\wedge")):
            alternatives |= _JOINERS.get(word or "", False) or token.value in ("\\lor", "\\vee")
            parts.append([])
        elif depth == 0 and token.kind == "sign" and token.value in ",;":
            parts.append([])
        elif depth == 0 and word == "either" and not parts[-1]:
            continue
        else:
            parts[-1].append(token)
    return ([part for part in parts if part] or [[]]), alternatives


def _both_signs(tokens: Sequence[Token]) -> list[list[Token]]:
    signs = ({"\\pm": "+", "\\mp": "-"}, {"\\pm": "-", "\\mp": "+"})
    return [[Token("sign", s[t.value]) if t.value in s else t for t in tokens] for s in signs]


def _declares_parameter(item: Thing) -> bool:
    if not isinstance(item, Relation) or item.operators != ("\\in",):
        return False
    left, right = item.sides
    return isinstance(left, Scalar) and isinstance(left.node, Symbol) and right in (NamedSet("Z"), NamedSet("N"))


def _bracketed(tokens: Sequence[Token], depth: int) -> Thing | None:
    opening, last = tokens[0].value, len(tokens) - 1
    if opening not in _OPENING or opening == "{" or tokens[0].kind == "text" or _closing_of_first(tokens) != last:
        return _set_by_name(tokens)
    closing = tokens[-1].value
    inside = tokens[1:-1]
    if opening == "\\{":
        condition, found = _split(inside, {"|", ":"})
        if found and len(condition) == 2:
            return _read(condition[1], depth + 1)
        items = _items(inside, depth)
        return Collection("set", items)
    parts, _ = _split_list(inside)
    if len(parts) == 1:
        if opening == "(" and closing == ")":
            inner = _read(inside, depth + 1)
            return inner if not isinstance(inner, Scalar) else None
        if opening == "[" and closing == "]" and any(t.value == "\\dots" for t in inside):
            return None
        return None
    items = _items(inside, depth)
    if {opening, closing} & {"\\langle", "\\rangle"} or (opening, closing) == ("(", ")"):
        return Collection("tuple", items)
    if (opening, closing) == ("[", "]"):
        return Collection("square" if len(items) == 2 else "tuple", items)
    if len(items) == 2 and all(isinstance(item, Scalar) for item in items):
        low, high = (item.node for item in items if isinstance(item, Scalar))
        return Interval(low, high, opening != "[", closing != "]")
    raise Unreadable("brackets that do not belong together")


def _items(inside: Sequence[Token], depth: int) -> tuple[Thing, ...]:
    parts, _ = _split_list(inside)
    return tuple(item for part in parts for item in _flat(_read(part, depth + 1, listed=True)))


def _set_by_name(tokens: Sequence[Token]) -> Thing | None:
    values = [token.value for token in tokens]
    if values == ["\\emptyset"]:
        return NamedSet("empty")
    if len(values) == 4 and values[:2] == ["\\mathbb", "{"] and values[2] in "RZNQC":
        return NamedSet(values[2])
    return None


def _environment(value: str, depth: int) -> Thing:
    name, _, body = value.partition("\n")
    rows = [re.split(r"(?<!\\)&", row) for row in re.split(r"\\\\|\\cr(?![A-Za-z])", body)]
    rows = [[re.sub(r"\\hline", "", cell).strip().rstrip(".,;") for cell in row] for row in rows]
    rows = [row for row in rows if any(row)]
    if name in _MATRICES:
        return Matrix(tuple(tuple(_read(tokenize(cell), depth + 1) for cell in row) for row in rows))
    if name in _ROWS:
        piecewise = name in ("cases", "dcases")
        things = [_row(row, depth + 1, piecewise and len(row) > 1) for row in rows]
        return things[0] if len(things) == 1 else Collection("list", tuple(things))
    raise Unreadable(f"an environment {name}")


def _row(cells: Sequence[str], depth: int, piecewise: bool) -> Thing:
    """One line of a system; the cells of a case distinction are kept apart."""
    if piecewise:
        return Matrix((tuple(_read(tokenize(cell), depth) for cell in cells),))
    return _read(tokenize(" ".join(filter(None, cells))), depth)


_BASED = re.compile(r"([0-9A-Fa-f]+)_\{?(?:\\text\{)?(\d+)\}?\}?")


def _scalar(tokens: Sequence[Token]) -> Thing:
    joined = canonical("".join(token.value for token in tokens if token.kind != "text"))
    based = _BASED.fullmatch(joined)
    if based and any(c.isdigit() for c in based[1]) and all(t.kind != "text" for t in tokens):
        return Based(based[1].lstrip("0").lower(), based[2])
    choice = _choice(tokens)
    if choice:
        return choice
    tokens = list(tokens)
    introduction = ""
    while tokens and tokens[0].kind == "text" and not (len(tokens) > 1 and tokens[1].value in ("_", "'", "(", "^")):
        introduction += _letters(tokens.pop(0).value)
    head, unit = units.split(tokens)
    percent = False
    while head and head[-1].value == "\\%":
        head, percent = head[:-1], True
    if not head:
        raise Unreadable("no value")
    return Scalar(formula.parse(list(head)), percent, unit, introduction)


def _choice(tokens: Sequence[Token]) -> Thing | None:
    """`(A)`, `A)` and `A.` name the choice A, also with the choice's value after them."""
    text = "".join(token.value for token in tokens[:4]).replace(" ", "")
    found = re.match(r"\(?([A-J])(?:\)(?![\^(_'/])|[.:])", text)
    if found and (len(tokens) <= 3 or tokens[0].kind == "text" or tokens[3].kind == "number"):
        return Scalar(Symbol(found[1]))
    return None
