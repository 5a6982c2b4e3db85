r"""Rewrites an answer as models write it into one LaTeX dialect, by bounded string work alone.

Unicode becomes commands (`−`, `√2`, `x²`, `½`, `≤`, `∞`), plain names become commands (`pi`, `sqrt(2)`, `exp(2)`), and
what does not change the meaning goes: math delimiters, fonts, spacing, `\left`, a sentence's full stop, an introducing
"Answer:". E notation is a power of ten: `4.5e33` is `4.5\times 10^{33}`, never Euler's e.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

_GREEK = re.findall(
    r"\w+",
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon phi chi "
    "psi omega",
)
_CHARACTERS = {
    **dict.fromkeys("−–—‒﹣－", "-"), **dict.fromkeys("×✕✖", r"\times "), "÷": r"\div ",
    **dict.fromkeys("·⋅∙•", r"\cdot "), "∗": "*", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ",
    "∞": r"\infty ", "∅": r"\emptyset ", "⌀": r"\emptyset ", **dict.fromkeys("≤⩽", r"\le "),
    **dict.fromkeys("≥⩾", r"\ge "), "≠": r"\ne ", **dict.fromkeys("≈≅≃", r"\approx "), "∈": r"\in ",
    "∪": r"\cup ", "∩": r"\cap ", "∖": r"\setminus ", "∨": r"\text{ or }", "∧": r"\text{ and }",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    "√": r"\sqrt ", "∛": r"\sqrt[3] ", "°": r"^{\circ}", "º": r"^{\circ}", "…": r"\ldots ", "⋯": r"\cdots ",
    "∠": r"\angle ", "ℏ": r"\hbar ", "⟨": r"\langle ", "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ",
    "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "’": "'", "‘": "'", "∶": ":", "，": ",", "。": ".", "∣": "|",
    "→": r"\to ", "µ": r"\mu ", "ϕ": r"\phi ", "ϵ": r"\epsilon ",
    **{char: f"\\{name} " for char, name in zip("αβγδεζηθικλμνξπρστυφχψω", _GREEK, strict=True)},
    **{char: f"\\{name.capitalize()} " for char, name in zip("ΓΔΘΛΞΠΣΦΨΩ", re.findall(
        r"\w+", "gamma delta theta lambda xi pi sigma phi psi omega"), strict=True)},
}  # fmt: skip
_TABLE = str.maketrans(_CHARACTERS)
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_ROOT = re.compile(r"([√∛])\s*(\d+(?:\.\d+)?)")
_VULGAR = re.compile("[¼-¾⅐-⅞]")

TEXT = r"\\(?:text(?:bf|it|rm|normal|sf|tt|up)?|mbox|hbox|mathrm|mathsf|mathtt|operatorname\*?)\s*"
"""Commands whose argument is words."""
_LETTER = re.compile(TEXT + r"\{\s*([A-Za-z])\s*\}")
_DELIMITERS = re.compile(r"(?<!\\)\$|(?<!\\)\\[()\[\]]|`")
_CURRENCY = re.compile(
    r"(?:\\text\{\s*)?\\\$(?:\s*\})?|\\(?:euro|pounds|textdollar|texteuro|textsterling|yen)(?![A-Za-z])|[$€£¥₹₽₩]"
)
_FONTS = re.compile(
    r"\\(?:boldsymbol|mathbf|bm|pmb|mathit|mathnormal|bold|boxed|fbox|displaystyle|textstyle|scriptstyle|limits|nolimits"
    r"|strut|underline|uline|emph|tiny|small|normalsize|large|Large|huge|Huge|color\{[a-z]*\}|textcolor\{[a-z]*\}|rm|bf|it|ensuremath)(?![A-Za-z])"
)
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?|middle)(?![A-Za-z])\s*\.?(?=[^A-Za-z]|$)")
_SPACES = re.compile(
    r"(?<!\\)\\[,;:!> ]|\\(?:quad|qquad|thinspace|hspace\*?\{[^{}]*\}|hfill|nobreakspace)(?![A-Za-z])|~|\s+"
)
_THIN_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:(?:\\[,; !]|~|\s|\{,\}|\{ , \}|\\text\{,\})\d{3})+(?![\d])")
_COMMA_GROUPS = re.compile(r"((?:[^,;=\[\]]{1,30}=)?\s*[-+]?\s*)(\d{1,3}(?:,\d{3})+)(?!\d)(.*)", re.DOTALL)
_E_NOTATION = re.compile(
    r"(?<![A-Za-z\\_^\d.])(?<![_^]\{)(\d+(?:\.\d*)?|\.\d+)(?:[eE]|\\(?:mathrm|text|rm|textrm)\{\s*[eE]\s*\})\{?([-+]?\d+)\}?(?![\d.A-Za-z])"
)
_TIMES_X = re.compile(r"(?<=\d)\s*[xX]\s*(?=10\s*\^)")
_REPEATING = re.compile(
    r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overbar|widebar)\s*(?:\{(\d+)\}|(\d))|\((\d+)\))(?![\d(\\])"
)
_MIXED = re.compile(r"(?<![\d.^_{/])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
_FUNCTIONS = (
    "sqrt|pi|exp|ln|log|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|asin|acos|atan|sinh|cosh|tanh|theta|alpha|beta|gamma"
    "|lambda|mu|omega|sigma|phi|infty|cup|cap|pm|binom"
)
_NAMES = re.compile(rf"(?<![\\A-Za-z])(?:{_FUNCTIONS})(?![A-Za-z])")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:infinity|inf|oo|Infinity)(?![A-Za-z])")
_JOINING = re.compile(r"(?<![\\A-Za-z{])\s(and|or)\s(?![A-Za-z]{2})")
_INTRODUCED = re.compile(
    r"(?:\\text\s*\{\s*|\*+)?(?:the\s+)?(?:final\s+)?(?:answer|result|ans|solution)(?:\s+is)?\s*[:=]\s*(?=.)",
    re.IGNORECASE,
)
_WHOLE_TEXT = re.compile(TEXT + r"\{([^{}]*)\}")
_PARAMETER = re.compile(
    r"(?:[\s,;(]|\\text\{[^{}]*\}|\\mid|\\forall|\||:)*(?:(?<=[,;(])\s*[a-z]\s*,\s*)?(?<![A-Za-z\\])([a-z])(?:_\{?\d\}?)?"
    r"\s*\\in\s*\\(?:mathbb|mathbf|Bbb)?\s*\{?\s*[ZN]\s*\}?(?:\s*[_^]\s*\{?[+*>\d]*\}?)?\s*\)?\s*$"
)
_INTEGER_WORDS = re.compile(
    r"(?:[\s,;(]|\\text\{[^{}]*\})*\s([a-z])\s*\\text\{\s*(?:is|being)?\s*(?:an?|any)?\s*integers?\s*\}\s*\)?\s*$"
)
_SYNONYMS: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"\\(?:dfrac|tfrac|cfrac|nicefrac|sfrac)(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])|<=|=<"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])|>=|=>(?!=)"), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])|\\not\s*=|!="), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])|&lt;"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])|&gt;"), ">"),
    (re.compile(r"\\(?:simeq|cong|thickapprox|doteq)(?![A-Za-z])"), r"\\approx "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:lbrack)(?![A-Za-z])"), "["),
    (re.compile(r"\\(?:rbrack)(?![A-Za-z])"), "]"),
    (re.compile(r"\\(?:lvert|rvert|vert|mid)(?![A-Za-z])"), "|"),
    (re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:ldots|cdots|dots|dotsc|dotsb|dotsm|vdots|ddots)(?![A-Za-z])|\.\s?\.\s?\."), r"\\dots "),
    (re.compile(r"\\(?:varphi)(?![A-Za-z])"), r"\\phi "),
    (re.compile(r"\\(?:varepsilon)(?![A-Za-z])"), r"\\epsilon "),
    (re.compile(r"\\(?:bigcup)(?![A-Za-z])"), r"\\cup "),
    (re.compile(r"\\(?:backslash|smallsetminus)(?![A-Za-z])"), r"\\setminus "),
    (re.compile(r"\\(?:Bbb|mathbf)\s*\{?R\}?(?![A-Za-z])|\\R(?![A-Za-z])"), r"\\mathbb{R}"),
    (re.compile(r"\\mathbb\s*([A-Z])"), r"\\mathbb{\1}"),
    (re.compile(r"\\(?:Z)(?![A-Za-z])"), r"\\mathbb{Z}"),
    (re.compile(TEXT + r"\{(arcsin|arccos|arctan|sin|cos|tan|ln|log|exp|sqrt|lcm|gcd)\}"), r"\\\1 "),
    (re.compile(r"\^\s*\{\s*\\(?:circ|degree|textdegree)\s*\}|\^\s*\\circ(?![A-Za-z])|\\(?:degree|textdegree)(?![A-Za-z])"),
     r"^{\\circ}"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\\(?:ast|star)(?![A-Za-z])|\*"), r"\\cdot "),
    (re.compile(r"(?<!\\)%|\\text\{\s*(?:\\?%|percent)\s*\}|(?<![A-Za-z])percent(?![A-Za-z])"), r"\\%"),
    (re.compile(r"\+\s*-|-\s*\+"), "-"),
    (re.compile(r"-\s*-(?=\s*[\d\\(a-zA-Z])"), "+"),
    (re.compile(r"(\^|_)\s*\{\s*(\w)\s*\}"), r"\1\2"),
]  # fmt: skip


def normalize(text: str) -> Normalized:
    r"""The answer in one dialect of LaTeX, without its delimiters, fonts, spacing and closing punctuation."""
    text = _from_unicode(text).strip()
    while len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2].strip()
    text = _CURRENCY.sub("", _DELIMITERS.sub(" ", text))
    text = _FONTS.sub("", _SIZES.sub("", text))
    text = _introduced(_unbraced(text.strip()))
    text = _LONG_EXPONENT.sub(r"^{\1}", _STARS.sub("^", text))
    text = _PERIODIC.sub(_repeating, text)
    text = _THIN_GROUPS.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _E_NOTATION.sub(r"\1\\times 10^{\2}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _JOINING.sub(r"\\text{ \1 }", _SPACES.sub(" ", re.sub(r"\\\\\s*\[[^\[\]]{0,9}\]", r"\\\\", text)))
    text = _LETTER.sub(lambda m: f" {m[1]} " if m[1] in "ei" else m[0], text)
    text = _TIMES_X.sub(r"\\times ", _REPEATING.sub(_repeating, text))
    text = _outside_words(text)
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text, parameter = _without_parameter(_PLUS_SIGN.sub("", text.strip()))
    return Normalized(_without_comma_groups(_strip_end(text)), parameter)


class Normalized(NamedTuple):
    text: str
    parameter: str
    r"""The letter that stands for any integer, where the text said so (`k \in \mathbb{Z}`), else empty."""

    def renamed(self, parameter: str) -> str:
        """The text with another letter for its parameter, where both are said."""
        if not self.parameter or not parameter or self.parameter == parameter:
            return self.text
        return re.sub(rf"(?<![A-Za-z\\]){self.parameter}(?![A-Za-z])", f" {parameter} ", self.text)


_WORD_COMMAND = re.compile(r"(" + TEXT + r"\{[^{}]*\})")


def _outside_words(text: str) -> str:
    """Names of functions and constants become commands where no command says that they are words."""
    parts = _WORD_COMMAND.split(text)
    for k in range(0, len(parts), 2):
        parts[k] = _NAMES.sub(r"\\\g<0> ", _INFINITY.sub(r"\\infty ", parts[k]))
    return "".join(parts)


_STARS = re.compile(r"(?<=[\w)}])\s*\*\*\s*(?=[\w(\\{-])")
_PERIODIC = re.compile(
    r"(?<!\d)(\d{0,20})\.(\d{0,6}?)(?:(\d)\3{2,20}|(\d{2,8})\4{1,4})()\s*(?:\.\.\.|\\l?dots(?![A-Za-z]))"
)
_LONG_EXPONENT = re.compile(r"\^\s*([-+]\d+|\d{2,})(?![\d.])")
_PLUS_SIGN = re.compile(r"^\+\s*")


def _from_unicode(text: str) -> str:
    text = _ROOT.sub(lambda m: ("\\sqrt" if m[1] == "√" else "\\sqrt[3]") + "{" + m[2] + "}", text)
    text = _RAISED.sub(lambda m: "^{" + "".join(_SUPERSCRIPTS[c] for c in m[0]) + "}", text)
    text = _LOWERED.sub(lambda m: "_{" + "".join(_SUBSCRIPTS[c] for c in m[0]) + "}", text)
    text = _VULGAR.sub(lambda m: "\\frac{{{}}}{{{}}}".format(*unicodedata.normalize("NFKC", m[0]).split("⁄")), text)
    return unicodedata.normalize("NFKC", text.translate(_TABLE))


def _unbraced(text: str) -> str:
    """The text without braces around the whole of it, a few layers of them."""
    for _ in range(8):
        if not (text.startswith("{") and text.endswith("}")):
            break
        depth = 0
        for match in re.finditer(r"\\.|[{}]", text):
            depth += (match[0] == "{") - (match[0] == "}")
            if depth == 0:
                break
        if match.end() < len(text) or "\\choose" in text:
            break
        text = text[1:-1].strip()
    return text


def _introduced(text: str) -> str:
    """The text without "Answer:" at its start, and without a text command around what is no word."""
    match = _INTRODUCED.match(text.strip())
    if match:
        rest = text.strip()[match.end() :]
        opened = "{" in match[0]
        closing = rest.find("}")
        if opened and closing >= 0:
            rest = rest[:closing] + " " + rest[closing + 1 :]
        text = rest
    whole = _WHOLE_TEXT.fullmatch(text.strip())
    if whole and not re.search("[A-Za-z]{2}", whole[1]):
        return whole[1]
    return text


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, *blocks = match.groups()
    block = next(b for b in blocks if b)
    if len(fixed) + len(block) > 50:
        return match[0]
    scale = 10 ** len(fixed)
    below = scale * (10 ** len(block) - 1)
    above = int((whole or "0") + fixed) * (10 ** len(block) - 1) + int(block)
    return f"(\\frac{{{above}}}{{{below}}})"


def _without_parameter(text: str) -> tuple[str, str]:
    r"""The text without `k \in \mathbb{Z}` at its end, where something comes before it, and `k`."""
    for pattern in (_PARAMETER, _INTEGER_WORDS):
        match = pattern.search(text[-200:])
        if match:
            start = max(0, len(text) - 200) + match.start()
            if re.search(r"[\w\\]", text[:start]) and text[:start].strip() not in ("\\{", "("):
                return text[:start], match[1]
    return text, ""


def _strip_end(text: str) -> str:
    """Removes the punctuation that ends a sentence or a list."""
    while True:
        text = text.strip()
        if text.endswith((".", ",", ";")) and not text.endswith("\\dots"):
            text = text[:-1]
        elif text.endswith(":") or text.startswith((",", ":")):
            text = text.strip(":, ")
        else:
            return text


def _without_comma_groups(text: str) -> str:
    """`1,000` is a number where it begins the text and no further comma makes a list of it."""
    match = _COMMA_GROUPS.fullmatch(text)
    if match and not re.search("[,;]", match[3]):
        return match[1] + match[2].replace(",", "") + match[3]
    return text


_IGNORED = re.compile(r"(?<!\d)\s+|\s+(?!\d)|(?<=[{(,])\+")


def canonical(normalized: str) -> str:
    """A normalized answer without spaces: equal results are equal answers."""
    return _IGNORED.sub("", normalized)
