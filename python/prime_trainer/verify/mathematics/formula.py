r"""Reads a normalized LaTeX formula of one value into a tree, without evaluating anything.

A recursive descent over tokens: sums, products (also without a sign: `2\pi r`), powers, fractions, roots, functions,
factorials, binomials, absolute values, symbols with subscripts and accents, mixed numbers. What it does not know
(integrals, sums with limits, text) raises Unreadable.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .tokens import MAX_DEPTH, Token, TooLarge, Unreadable


@dataclass(frozen=True)
class Number:
    """An exact rational; `decimal` where it was written with a decimal point."""

    value: Fraction
    decimal: bool = False


@dataclass(frozen=True)
class Symbol:
    name: str


@dataclass(frozen=True)
class Apply:
    """An operation (`+`, `*`, `/`, `^`, `neg`, `!`, a function's name) of its arguments."""

    name: str
    args: tuple[Node, ...]


Node = Number | Symbol | Apply

INFINITY = Symbol("\\infty")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


FUNCTIONS = _names(
    "sin cos tan cot sec csc arcsin arccos arctan arccot sinh cosh tanh coth ln log lg exp asin acos atan"
)
_GREEK = _names(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi "
    "omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega hbar ell partial nabla Re Im aleph wp imath "
    "prime angle triangle square diamond circ"
)
_ACCENTS = _names(
    "hat bar vec tilde dot ddot overline underline widehat widetilde overrightarrow mathcal mathscr mathfrak "
    "mathbb overset check breve"
)
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_PAIRS = {"\\lfloor": ("\\rfloor", "floor"), "\\lceil": ("\\rceil", "ceil"), "\\lVert": ("\\rVert", "norm")}


def parse(tokens: list[Token]) -> Node:
    """The tree of all the tokens; raises Unreadable."""
    reader = _Reader(tokens)
    node = reader.sum()
    if reader.peek() is not None:
        raise Unreadable(f"unexpected {reader.peek()}")
    return node


class _Reader:
    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.position, self.depth, self.bars = tokens, 0, 0, 0

    def peek(self, offset: int = 0) -> Token | None:
        place = self.position + offset
        return self.tokens[place] if place < len(self.tokens) else None

    def value(self) -> str:
        token = self.peek()
        return "" if token is None or token.kind == "text" else token.value

    def take(self) -> Token:
        token = self.peek()
        if token is None:
            raise Unreadable("the formula ends too early")
        self.position += 1
        return token

    def accept(self, *values: str) -> bool:
        if self.value() in values and self.value():
            self.position += 1
            return True
        return False

    def expect(self, value: str) -> None:
        if not self.accept(value):
            raise Unreadable(f"expected {value}, got {self.peek()}")

    def sum(self) -> Node:
        terms = [self.signed()]
        while self.value() in ("+", "-"):
            terms.append(self.signed())
        return terms[0] if len(terms) == 1 else Apply("+", tuple(terms))

    def signed(self) -> Node:
        negative = False
        while self.value() in ("+", "-"):
            negative ^= self.take().value == "-"
        product = self.product()
        return Apply("neg", (product,)) if negative else product

    def product(self) -> Node:
        node = self.factor()
        while True:
            if self.accept("\\cdot", "\\times", "*"):
                node = Apply("*", (node, self.signed_factor()))
            elif self.accept("/", "\\div"):
                node = Apply("/", (node, self.signed_factor()))
            elif self.accept("\\bmod"):
                node = Apply("mod", (node, self.signed_factor()))
            elif self.starts_factor():
                node = self.juxtaposed(node)
            else:
                return node

    def juxtaposed(self, before: Node) -> Node:
        token = self.peek()
        last = self.tokens[self.position - 1]
        after = self.factor()
        if last.kind == "number" and isinstance(before, Number) and _proper(after) and token == ("command", "\\frac"):
            return Apply("+", (before, after))  # 3\frac{1}{2} is three and a half
        if last.kind == "number" and token is not None and token.kind == "number":
            raise Unreadable("two numbers side by side")
        return Apply("*", (before, after))

    def signed_factor(self) -> Node:
        if self.accept("-"):
            return Apply("neg", (self.factor(),))
        self.accept("+")
        return self.factor()

    def starts_factor(self) -> bool:
        token = self.peek()
        if token is None:
            return False
        if token.kind in ("number", "letter", "text"):
            return True
        if token.kind == "command":
            name = token.value[1:]
            return (
                name in FUNCTIONS or name in _GREEK or name in _ACCENTS or token.value in _PAIRS
                or name in ("frac", "sqrt", "pi", "infty", "binom", "choose", "tbinom", "dbinom", "operatorname", "|")
            )  # fmt: skip
        return token.value in ("(", "[", "{") or (token.value == "|" and self.bars == 0)

    def factor(self) -> Node:
        node = self.atom()
        while True:
            if self.value() == "^":
                node = self.power(node)
            elif self.accept("!"):
                node = Apply("!!" if self.accept("!") else "!", (node,))
            elif self.accept("\\%"):
                node = Apply("/", (node, Number(Fraction(100))))
            else:
                return node

    def power(self, base: Node) -> Node:
        self.expect("^")
        if self.accept("\\circ"):
            return Apply("degrees", (base,))
        exponent = self.argument()
        if exponent == Symbol("\\circ"):
            return Apply("degrees", (base,))
        if exponent in (Symbol("'"), Symbol("\\prime")) and isinstance(base, Symbol):
            return Symbol(base.name + "'")
        if self.value() == "^":
            raise Unreadable("two exponents")
        return Apply("^", (base, exponent))

    def argument(self) -> Node:
        """What follows a command, `^` or `_`: a group in braces, or one token (`\\frac12` has two)."""
        if self.accept("{"):
            node = self.sum()
            self.expect("}")
            return node
        token = self.peek()
        if token is not None and token.kind == "number" and token.value.isdigit() and len(token.value) > 1:
            self.tokens[self.position] = Token("number", token.value[1:])
            return Number(Fraction(int(token.value[0])))
        if token is not None and token.value in ("-", "+"):
            self.position += 1
            node = self.atom()
            return Apply("neg", (node,)) if token.value == "-" else node
        return self.atom()

    def atom(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise TooLarge("too deep")
        node = self.one_atom(self.take())
        self.depth -= 1
        return node

    def one_atom(self, token: Token) -> Node:
        if token.kind == "number":
            if len(token.value) > 4_000:
                raise TooLarge("a number of thousands of digits")
            node: Node = Number(Fraction(token.value.removesuffix(".")), "." in token.value)
            return self.no_subscript(node)
        if token.kind == "letter" or (token.kind == "text" and re.fullmatch(r"[A-Za-z ]{1,30}", token.value)):
            return self.symbol(token.value.strip())
        if token.kind == "command":
            return self.command(token.value)
        if token.value in _CLOSING:
            node = self.sum()
            self.expect(_CLOSING[token.value]) if token.value != "{" or not self.accept("\\choose") else None
            if self.tokens[self.position - 1].value == "\\choose":
                node = Apply("binom", (node, self.sum()))
                self.expect("}")
            return node
        if token.value == "|" and self.bars == 0:
            return self.absolute("|")
        raise Unreadable(f"unexpected {token}")

    def no_subscript(self, node: Node) -> Node:
        if self.value() == "_":
            raise Unreadable("a number with a subscript")
        return node

    def absolute(self, closing: str) -> Node:
        self.bars += 1
        node = self.sum()
        self.expect(closing)
        self.bars -= 1
        return Apply("abs", (node,))

    def command(self, value: str) -> Node:
        name = value[1:]
        if name == "frac":
            return Apply("/", (self.argument(), self.argument()))
        if name == "sqrt":
            return self.root()
        if name in ("binom", "tbinom", "dbinom"):
            return Apply("binom", (self.argument(), self.argument()))
        if name in FUNCTIONS:
            return self.function(name)
        if value in _PAIRS:
            closing, function = _PAIRS[value]
            node = self.sum()
            self.expect(closing)
            return Apply(function, (node,))
        if name == "|":
            return self.absolute("\\|")
        if name == "infty":
            return INFINITY
        if name == "pi" or name in _GREEK:
            return self.symbol(value)
        if name in _ACCENTS:
            return self.symbol(f"{value}{{{self.raw()}}}")
        if name in ("{", "langle"):
            raise Unreadable("a set inside a formula")
        raise Unreadable(f"unknown {value}")

    def root(self) -> Node:
        if self.accept("["):
            degree = self.sum()
            self.expect("]")
            return Apply("^", (self.argument(), Apply("/", (Number(Fraction(1)), degree))))
        if self.value() == "(":
            return Apply("sqrt", (self.atom(),))
        return Apply("sqrt", (self.argument(),))

    def function(self, name: str) -> Node:
        base: Node | None = None
        exponent: Node | None = None
        for _ in range(2):
            if self.value() == "_" and base is None:
                self.take()
                base = self.argument()
            elif self.value() == "^" and exponent is None:
                self.take()
                exponent = self.argument()
        argument = self.function_argument()
        if name in ("log", "lg") and base is None and name == "lg":
            base = Number(Fraction(10))
        if exponent == Apply("neg", (Number(Fraction(1)),)) and name in ("sin", "cos", "tan", "cot"):
            name, exponent = f"arc{name}", None
        node: Node = Apply(name if name != "lg" else "log", (argument,) if base is None else (argument, base))
        return node if exponent is None else Apply("^", (node, exponent))

    def function_argument(self) -> Node:
        if self.value() in ("(", "[", "{", "|"):
            node = self.atom()
            while self.value() in ("^", "!"):
                if self.value() == "^" and self.tokens[self.position - 1].value != "}":
                    break
                node = self.factor_after(node)
            return node
        if self.accept("-"):
            return Apply("neg", (self.factor(),))
        node = self.factor()
        while self.starts_factor() and self.value() not in ("(", "[", "{") and self.value()[1:] not in FUNCTIONS:
            node = Apply("*", (node, self.factor()))
        if self.value() == "/" and isinstance(node, (Symbol, Number)):  # \sin x/2 is read as people write it
            following = self.peek(1)
            if following is not None and following.kind == "number":
                self.take()
                node = Apply("/", (node, self.factor()))
        return node

    def factor_after(self, node: Node) -> Node:
        if self.value() == "^":
            return self.power(node)
        self.expect("!")
        return Apply("!", (node,))

    def symbol(self, name: str) -> Node:
        while True:
            if self.accept("'"):
                name += "'"
            elif self.value() == "_":
                self.take()
                name += f"_{self.raw()}"
            else:
                break
        return Symbol(name)

    def raw(self) -> str:
        """The plain text of an argument: subscripts and what stands below an accent."""
        token = self.take()
        if token.value != "{" or token.kind == "text":
            return token.value.lstrip("\\").strip()
        depth, parts = 1, []
        while depth:
            token = self.take()
            depth += (token.value == "{") - (token.value == "}") if token.kind != "text" else 0
            if token.value not in ("{", "}", "\\cdot", "\\mathrm"):
                parts.append(token.value.lstrip("\\").strip())
        return "".join(parts)


def _proper(node: Node) -> bool:
    """Whether a node is a fraction of whole numbers below one."""
    if not isinstance(node, Apply) or node.name != "/":
        return False
    above, below = node.args
    return (
        isinstance(above, Number) and isinstance(below, Number) and above.value.denominator == 1
        and below.value.denominator == 1 and 0 < above.value < below.value
    )  # fmt: skip
