r"""Units behind a value: `\text{ cm}^2`, `\mathrm{m\,s^{-1}}`, `km/h`, `square inches`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from .tokens import Token

_NAMES = {
    "m": "meter meters metre metres", "cm": "centimeter centimeters centimetre centimetres",
    "mm": "millimeter millimeters millimetre millimetres", "km": "kilometer kilometers kilometre kilometres kms",
    "nm": "nanometer nanometers", "um": "micrometer micrometers", "in": "inch inches", "ft": "foot feet",
    "yd": "yard yards", "mi": "mile miles", "g": "gram grams", "kg": "kilogram kilograms kgs",
    "mg": "milligram milligrams", "lb": "pound pounds lbs", "oz": "ounce ounces", "s": "sec secs second seconds",
    "ms": "millisecond milliseconds", "min": "mins minute minutes", "h": "hr hrs hour hours", "day": "days",
    "week": "weeks", "month": "months", "year": "years yr yrs", "N": "newton newtons", "J": "joule joules",
    "kJ": "kilojoule kilojoules", "W": "watt watts", "kW": "kilowatt kilowatts", "Pa": "pascal pascals", "kPa": "",
    "Hz": "hertz", "V": "volt volts", "A": "amp amps ampere amperes", "C": "coulomb coulombs", "K": "kelvin kelvins",
    "mol": "mole moles", "L": "liter liters litre litres l", "mL": "milliliter milliliters ml", "eV": "", "keV": "",
    "MeV": "", "GeV": "", "T": "tesla", "dollar": "dollars usd", "cent": "cents", "euro": "euros", "mph": "",
    "AU": "au", "pc": "parsec parsecs", "kpc": "", "Mpc": "", "cal": "calories", "kcal": "", "rad": "radian radians",
    "ohm": "ohms", "erg": "ergs", "dyne": "dynes", "acre": "acres", "gallon": "gallons",
    "": "unit units degree degrees deg",
}  # fmt: skip
_CANONICAL = {word: name for name, words in _NAMES.items() for word in [name, *words.split()] if word}
_PLAIN = "|".join(sorted((re.escape(w) for w in _CANONICAL if len(w) > 1), key=len, reverse=True))
_WRITTEN = re.compile(rf"(?<=[\d}})])\s*((?:(?:square|cubic|sq|cu)\.?\s+)?(?:{_PLAIN}))(?![A-Za-z\d_(])")
_WORD = re.compile(r"[A-Za-zµ]+|\^\s*\{?\s*(-?\d+)\s*\}?|/")


@dataclass(frozen=True)
class Unit:
    """Exponents of its parts; `known` if every word is in the table of units."""

    parts: tuple[tuple[str, int], ...]
    known: bool


def mark(text: str) -> str:
    r"""Puts `\text{}` around the units that stand bare behind a number."""
    return _WRITTEN.sub(r"\\text{ \1}", text)


def split(tokens: Sequence[Token]) -> tuple[Sequence[Token], Unit | None]:
    """The tokens of the value, and the unit behind it."""
    depth = 0
    for place, token in enumerate(tokens):
        if token.kind != "text":
            depth += (token.value in ("{", "(", "[")) - (token.value in ("}", ")", "]"))
        elif depth == 0 and place and tokens[place - 1].value not in ("_", "^") and _is_tail(tokens[place:]):
            while place > 1 and tokens[place - 1].value in ("\\cdot", "\\times", "-"):
                place -= 1
            return tokens[:place], _unit(tokens[place:])
    return tokens, None


def _is_tail(tokens: Sequence[Token]) -> bool:
    return all(
        token.kind in ("text", "number") or token.value in ("^", "{", "}", "-", "/", "\\cdot", "\\times", "(", ")")
        or (token.kind == "letter" and token.value in _CANONICAL)
        for token in tokens
    )  # fmt: skip


def _unit(tokens: Sequence[Token]) -> Unit:
    text = " ".join(token.value for token in tokens).replace("\\cdot", " ").replace("\\times", " ")
    text = re.sub(r"\\[A-Za-z]+", " ", text)
    text = re.sub(r"\bper\b", "/", text)
    parts: dict[str, int] = {}
    known, sign, last, factor = True, 1, "", 1
    for match in _WORD.finditer(text):
        word = match[0]
        if word == "/":
            sign = -1
        elif word.startswith("^"):
            if last:
                parts[last] += (int(match[1]) - 1) * (1 if parts[last] > 0 else -1)
        elif word.lower() in ("square", "sq", "cubic", "cu"):
            factor = 2 if word.lower().startswith("sq") else 3
        else:
            last = _CANONICAL.get(word, _CANONICAL.get(word.lower(), word.lower()))
            known &= word in _CANONICAL or word.lower() in _CANONICAL
            if last:
                parts[last] = parts.get(last, 0) + sign * factor
            sign, factor = 1, 1
    return Unit(tuple(sorted((name, power) for name, power in parts.items() if power)), known)


def differ(reference: Unit | None, answer: Unit | None) -> bool:
    """Whether both sides name units that are known and not the same."""
    if reference is None or answer is None or not reference.known or not answer.known:
        return False
    return bool(reference.parts) and bool(answer.parts) and reference.parts != answer.parts
