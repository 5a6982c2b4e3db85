"""Which scorers evaluate the text of an answer, and what is let through to each.

Every answer is scored in a process of its own that can only compute (worker.py), so a text can change no other verdict.
What stands here keeps it from taking over its own: code in it is never run. There are two barriers. A scorer named in
`EVALUATING` sees a text only when `readable` finds nothing in it but numbers, operators and names that the problem has.
And whatever a library is about to evaluate, in any scorer, is refused by `may_evaluate` when it names anything else.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

from .answers import GymAnswer, ScoredAnswer

MAX_LATEX_CHARS, MAX_LATEX_DEPTH = 4000, 60
_FUNCTIONS = frozenset(
    """
    sin cos tan sec csc cot asin acos atan asec acsc acot sinh cosh tanh asinh acosh atanh exp log ln sqrt cbrt Abs
    erf erfi Si Ci Ei pi E I oo C
    """.split()  # noqa: SIM905
)
# What sympy's own parser puts around numbers and names.
_PARSED = frozenset(("Integer", "Float", "Rational", "Symbol", "Function", "factorial", "factorial2"))


class Refused(Exception):
    """A text that is not read, as reading would run it."""


@dataclass(frozen=True)
class Evaluating:
    """How a scorer evaluates an answer's text (`evaluates`) and what it is given (`reads`)."""

    evaluates: str
    reads: str
    names: Callable[[dict[str, Any]], frozenset[str]] | None = None
    """The names that a text may have, by the problem's entry; None where the text is compared or read as a literal."""


def _nothing(entry: dict[str, Any]) -> frozenset[str]:
    return frozenset()


def _variables(entry: dict[str, Any]) -> frozenset[str]:
    return frozenset(re.findall(r"[A-Za-z]\w*", str(entry.get("answer")))) - {"Symbol"}


def _integral(entry: dict[str, Any]) -> frozenset[str]:
    metadata = entry.get("metadata")
    variable = metadata.get("variable") if isinstance(metadata, dict) else None
    # sympy leaves parts of some integrals as `Integral(..)`: the reference says so.
    return _FUNCTIONS | _variables(entry) | ({variable} if isinstance(variable, str) else set())


_LITERAL = Evaluating("eval", "the text, or a literal (ast.literal_eval in the place of eval)")
_ARITHMETIC = Evaluating("sympy.parse_expr", "numbers and operators", _nothing)
_INTEGRAL = Evaluating(
    "sympy.parse_expr", "numbers, operators, the variable, C, elementary functions, the reference's names", _integral
)
EVALUATING = {
    "binary_matrix": _LITERAL,
    "n_queens": _LITERAL,
    "spiral_matrix": _LITERAL,
    "string_insertion": _LITERAL,
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "polynomial_multiplication": Evaluating("sympy.parse_expr", "numbers, operators, the variables", _variables),
    "simple_integration": _INTEGRAL,
    "intermediate_integration": _INTEGRAL,
}
"""The scorers of reasoning-gym that evaluate the text of an answer."""

MATH = Evaluating(
    "for what the grammar in mathematics/ does not know: math-verify, and so sympy",
    f"LaTeX of at most {MAX_LATEX_CHARS} characters, {MAX_LATEX_DEPTH} brackets deep",
)


# Pairs of (reference, answer) that are scored before the first real one: what they import and what the grammar learns
# of LaTeX is then there in every child, which else would begin anew.
EXAMPLES = (
    ("\\frac{3}{8}", "\\frac{6}{16}"), ("\\frac{1}{2}", "0.5"), ("3\\sqrt{2}", "\\frac{6}{\\sqrt{2}}"),
    ("-17", "-17.0"),
    ("x^2+2x+1", "(x+1)^2"), ("(1, 2)", "(1,2.0)"), ("\\{1, 2\\}", "\\{2,1\\}"), ("[0, \\infty)", "[0,\\infty )"),
    ("\\frac{\\pi}{3}", "\\pi/3"), ("12,345", "12345.0"), ("45^\\circ", "45.0"), ("x = 5", "5.0"), ("25\\%", "0.25"),
    ("2^{10}", "1024.0"), ("\\sin x + e^{2x}", "e^{2x} + \\sin(x)"), ("\\log_2 8", "\\ln(20.1)"), ("3 + 4i", "4i+3"),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\begin{pmatrix} 1.0 & 2 \\\\ 3 & 4 \\end{pmatrix}"),
    ("(-\\infty, 2] \\cup (3, 5)", "(-\\infty,2]\\cup(3,5.0)"), ("x \\le 3", "x \\leq 3.0"),
    ("\\text{(B)}", "\\text{B}"),
    ("1\\frac{1}{2}", "3/2"), ("a, b", "b,a"), ("\\binom{5}{2}", "10.0"), ("n!", "n! "), ("|x|", "\\sqrt{x^2}"),
    ("\\int_0^1 x^2 dx", "\\frac{1}{3}"), ("\\sum_{k=1}^{3} k", "\\lim_{x \\to 0} \\frac{\\sin x}{x}"),
)  # fmt: skip


def table() -> list[tuple[str, str, str]]:
    """Rows of (scorer, what evaluates, what it is given), for the documentation."""
    rows = [(f"reasoning-gym: {name}", e.evaluates, e.reads) for name, e in sorted(EVALUATING.items())]
    return [("mathematics", MATH.evaluates, MATH.reads), *rows]


def prepare(dataset: str, module: str) -> None:
    """Makes a loaded dataset's module read literals where it would evaluate, and imports what its scorer will need."""
    how = EVALUATING.get(dataset)
    if how is _LITERAL:
        vars(sys.modules[module])["eval"] = ast.literal_eval
    elif how is not None:
        import sympy

        x = sympy.Symbol("x")
        sympy.simplify(sympy.diff(sympy.parse_expr("x**2*sin(x)/2 + exp(2*x)"), x) - x)


def names(answer: ScoredAnswer) -> frozenset[str]:
    """The names of the problem that its scorer may evaluate."""
    how = EVALUATING.get(answer.dataset) if isinstance(answer, GymAnswer) else None
    return how.names(answer.entry) if isinstance(answer, GymAnswer) and how and how.names else frozenset()


# Numbers first, so that the e of 1e5 is no name. Words are what Python or sympy could take for one.
_TOKEN = re.compile(r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|(?P<word>[^\W\d]\w*)|(?P<other>[^-+*/^!().,\s\d])")
_CODE = frozenset("'\"_`#;:@{}[]=&|~<>%")


def readable(answer: GymAnswer, text: str) -> bool:
    """Whether the scorer of `answer` may see `text`; False for what is no expression, and wrong.

    Raises Refused for what would run as code.
    """
    how = EVALUATING.get(answer.dataset)
    if how is None or how.names is None:
        return True
    allowed = how.names(answer.entry)
    tokens = list(_TOKEN.finditer(text))
    if any(match["other"] == "\\" or (match["other"] or " ") not in _CODE | {" "} for match in tokens):
        return False  # LaTeX, or signs that are not Python's
    for match in tokens:
        if match["word"] and match["word"] not in allowed:
            raise Refused(f"the name {match['word']!r:.40}")
        if match["other"] in _CODE - set("[]=<>%"):
            raise Refused(f"the character {match['other']!r}")
    return not any(match["other"] for match in tokens)


def check_latex(text: str) -> None:
    """Raises Refused for LaTeX that is too long or nested too deeply for a recursive parser."""
    if len(text) > MAX_LATEX_CHARS:
        raise Refused(f"more than {MAX_LATEX_CHARS} characters")
    depth = 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if depth > MAX_LATEX_DEPTH:
            raise Refused(f"more than {MAX_LATEX_DEPTH} open brackets")


# Libraries that write code of their own: names of fields and of monomials, never a text.
_WRITERS = tuple(os.path.join("sympy", *p) for p in (("polys", "monomials.py"),))
_STDLIB = os.path.dirname(os.__file__)
_OWN = frozenset(("dataclasses.py", "collections/__init__.py", "enum.py", "typing.py"))


def may_evaluate(code: CodeType, caller: str, known: frozenset[str]) -> bool:
    """Whether `code`, about to run for the file `caller`, is a module or has no names but sympy's and the `known`.

    This is asked at the last moment and sees the code itself, so no way of writing it gets past.
    """
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen "):
        return True  # a module that is imported late
    if os.path.relpath(caller, _STDLIB) in _OWN or caller.endswith(_WRITERS):
        return True
    if code.co_names == ("sympy",) and code.co_consts == (0, ("*",), None):
        return True  # `from sympy import *`, how its parser begins
    return _known(code, known | _PARSED | _FUNCTIONS)


def _known(code: CodeType, known: frozenset[str]) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names) <= known and not inner
