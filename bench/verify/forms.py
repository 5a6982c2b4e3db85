"""Other ways in which models write a reference answer."""

import re
from collections.abc import Callable
from decimal import Decimal

_E_NOTATION = re.compile(r"(-?\d+(?:\.\d+)?)e([-+]?\d+)")
_INTEGER, _DECIMAL = re.compile(r"-?\d+"), re.compile(r"-?\d+(?:\.\d+)?")
_FRACTION = re.compile(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}")
_INTERVAL = re.compile(r"([(\[])\s*([^,()\[\]]+),\s*([^,()\[\]]+)([)\]])")
_VALUE = re.compile(r"[^=<>,;]+")
_WORDS = re.compile(r"\\(?:text|mbox|mathrm|begin|in\b|le|ge|ne|approx|cup|sim|equiv|quad)|[A-Za-z]{3}")

Form = Callable[[str], str | None]


def _number(answer: str) -> Decimal | None:
    return Decimal(answer.replace("e", "E")) if _DECIMAL.fullmatch(answer) or _E_NOTATION.fullmatch(answer) else None


def _power_of_ten(pattern: str) -> Form:
    def form(answer: str) -> str | None:
        found = _E_NOTATION.fullmatch(answer)
        return found and pattern.format(found[1], int(found[2]))

    return form


def _decimal(answer: str) -> str | None:
    return format(_number(answer), "f") if _E_NOTATION.fullmatch(answer) else None


def _scientific(answer: str) -> str | None:
    """A number as mantissa and power of ten."""
    value = _number(answer)
    if value is None or value == 0 or _E_NOTATION.fullmatch(answer):
        return None
    sign, digits, exponent = value.as_tuple()
    mantissa = "".join(map(str, digits))
    power = len(mantissa) - 1 + int(exponent)
    return f"{'-' if sign else ''}{mantissa[0]}.{mantissa[1:] or '0'}e{power}"


def _number_in(pattern: str) -> Form:
    return lambda answer: pattern.format(answer) if _DECIMAL.fullmatch(answer) else None


def _replaced(*pairs: tuple[str, str]) -> Form:
    def form(answer: str) -> str | None:
        text = answer
        for pattern, replacement in pairs:
            text = re.sub(pattern, replacement, text)
        return text if text != answer else None

    return form


def _formula_in(pattern: str) -> Form:
    """For values: no words, relations, lists or sets."""

    def form(answer: str) -> str | None:
        text = answer.strip("$ ")
        plain = _VALUE.fullmatch(re.sub(r"\d,\d{3}", "", text)) and not _WORDS.search(text)
        return pattern.format(text) if plain else None

    return form


def _mixed(answer: str) -> str | None:
    found = _FRACTION.fullmatch(answer)
    if not found:
        return None
    whole, rest = divmod(int(found[2]), int(found[3]))
    return f"{found[1]}{whole} {rest}/{found[3]}" if whole and rest else None


def _inequality(answer: str) -> str | None:
    found = _INTERVAL.fullmatch(answer.replace("\\left", "").replace("\\right", ""))
    if not found or ("infty" in found[2] + found[3] and found[1] == "(" and found[4] == ")"):
        return None
    left, low, high, right = (part.strip() for part in found.groups())
    if (left, right) == ("[", "]") or (left, right) == ("(", ")"):
        return None if "infty" not in low + high else _half_line(left, low, high, right)
    below, above = ("<" if end in "()" else "\\le" for end in (left, right))
    return _half_line(left, low, high, right) or f"{low} {below} x {above} {high}"


def _half_line(left: str, low: str, high: str, right: str) -> str | None:
    if "infty" in low:
        return "x < " + high if right == ")" else "x \\le " + high
    if "infty" in high:
        return "x > " + low if left == "(" else "x \\ge " + low
    return None


def _grouped(separator: str) -> Form:
    def form(answer: str) -> str | None:
        if not _INTEGER.fullmatch(answer) or len(answer.lstrip("-")) < 4:
            return None
        return f"{int(answer):,}".replace(",", separator)

    return form


def _everywhere(pattern: str) -> Form:
    return lambda answer: pattern % answer.strip("$ ")


FORMS: dict[str, Form] = {
    "dollars": _everywhere("$%s$"),
    "parentheses": _everywhere(r"\(%s\)"),
    "brackets": _everywhere(r"\[%s\]"),
    "bold Markdown": _everywhere("**%s**"),
    "boldsymbol": _everywhere(r"\boldsymbol{%s}"),
    "mathbf": _everywhere(r"\mathbf{%s}"),
    "displaystyle": _everywhere(r"\displaystyle %s"),
    "trailing comma": _everywhere("%s,"),
    "trailing full stop": _everywhere("%s ."),
    "Answer:": _everywhere("Answer: %s"),
    "text Answer:": _everywhere(r"\text{Answer: }%s"),
    "text": _number_in(r"\text{{{}}}"),
    "spaces": _everywhere(r"\ %s \quad"),
    "named": _formula_in("S = {}"),
    "named maximum": _formula_in(r"S_{{\max}} = {}"),
    "named r_e": _formula_in("r_e = {}"),
    "named function": _formula_in("f(t) = {}"),
    "times": _power_of_ten(r"{}\times 10^{{{}}}"),
    "cdot": _power_of_ten(r"{} \cdot 10^{{{}}}"),
    "E": _power_of_ten("{}E{}"),
    "e, signed": _power_of_ten("{}e{:+03d}"),
    "star": _power_of_ten("{}*10^{}"),
    "x": _power_of_ten("{} x 10^{}"),
    "times, Unicode": _power_of_ten("{} × 10^{{{}}}"),
    "decimal": _decimal,
    "e notation": _scientific,
    "degrees": _number_in("{}°"),
    "degree": _number_in(r"{}\degree"),
    "circ": _number_in(r"{}^{{\circ}}"),
    "euro": _number_in("{} €"),
    "dollar": _number_in(r"\${}"),
    "unit": _number_in(r"{} \text{{ cm}}"),
    "unit, roman": _number_in(r"{}\,\mathrm{{m\,s^{{-1}}}}"),
    "percent": _number_in(r"{}\%"),
    "percent left out": _replaced((r"\\%$", "")),
    "minus, Unicode": _replaced(("-", "−")),
    "root, Unicode": _replaced((r"\\sqrt\{(\w)\}", r"√\1"), (r"\\sqrt\{", "√{")),
    "pi, Unicode": _replaced((r"\\pi(?![A-Za-z])", "π")),
    "infinity, Unicode": _replaced((r"\\infty", "∞")),
    "square, Unicode": _replaced((r"\^(?:\{2\}|2(?!\d))", "²")),
    "relation, Unicode": _replaced((r"\\leq?(?![A-Za-z])", "≤"), (r"\\geq?(?![A-Za-z])", "≥")),
    "half, Unicode": _replaced((r"\\d?frac\{1\}\{2\}", "½")),
    "pi": _replaced((r"\\pi(?![A-Za-z])\s*", " pi ")),
    "star for a product": _replaced((r"\\cdot(?![A-Za-z])|\\times(?![A-Za-z])", "*")),
    "sqrt()": _replaced((r"\\sqrt\{([^{}\[\]]+)\}", r" sqrt(\1)")),
    "slash": _replaced((r"(?<![\d ])\\d?frac\{(\d+)\}\{(\d+)\}", r"(\1/\2)")),
    "dfrac": _replaced((r"\\frac", r"\\dfrac")),
    "short fraction": _replaced((r"\\d?frac\{(\d)\}\{(\d)\}", r"\\frac\1\2")),
    "exp": _replaced((r"(?<![A-Za-z\\])e\^\{([^{}]+)\}", r"\\exp(\1)")),
    "roman e": _replaced((r"(?<![A-Za-z\\\d{])e(?=\^)", r"\\mathrm{e}")),
    "mixed number": _mixed,
    "lbrace": _replaced((r"\\\{", r"\\lbrace "), (r"\\\}", r"\\rbrace ")),
    "left, right": _replaced((r"(?<![A-Za-z\\])\(", r"\\left("), (r"(?<!\\)\)", r"\\right)")),
    "inequality": _inequality,
    "thousands": _grouped(","),
    "thousands, thin": _grouped(r"\,"),
    "thousands, braces": _grouped("{,}"),
    "decimal zero": lambda a: a + ".0" if _INTEGER.fullmatch(a) else None,
    "integers": _everywhere(r"%s, k \in \mathbb{Z}"),
}  # fmt: skip


def written(answer: str) -> dict[str, str]:
    """The forms of an answer that apply."""
    return {name: text for name, form in FORMS.items() if (text := form(answer)) is not None}
