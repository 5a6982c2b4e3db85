"""Tokens of a normalized answer."""

from __future__ import annotations

import re
from typing import NamedTuple

from .normalize import TEXT

MAX_DEPTH = 60
MAX_TOKENS = 3_000


class Unreadable(ValueError):
    """The text is no formula of this grammar."""


class TooLarge(ValueError):
    """The text is larger or deeper than any answer: it is not looked at."""


class Token(NamedTuple):
    kind: str
    """`number`, `command`, `letter`, `text`, `environment` or `sign` (any other character)."""
    value: str


_TOKEN = re.compile(
    r"(?P<text>" + TEXT + r"\{(?P<words>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\})|(?P<command>\\(?:[A-Za-z]+|[^A-Za-z]))"
    r"|(?P<number>\d+(?:\.\d*)?|\.\d+)|(?P<letter>[A-Za-z])|(?P<space>\s+)|(?P<sign>.)",
    re.DOTALL,
)
_BEGIN, _END = re.compile(r"\\begin\s*\{(\w+\*?)\}(?:\{[lcr|\s]*\})?"), re.compile(r"\\(begin|end)\s*\{(\w+\*?)\}")


def tokenize(text: str) -> list[Token]:
    """The tokens of a normalized text; an environment is one token. Raises Unreadable for one that never ends."""
    tokens: list[Token] = []
    position = 0
    while position < len(text):
        begin = _BEGIN.match(text, position)
        if begin:
            end = _end_of_environment(text, begin.end())
            tokens.append(Token("environment", begin[1] + "\n" + text[begin.end() : end.start()]))
            position = end.end()
            continue
        match = _TOKEN.match(text, position)
        if match is None:
            raise Unreadable(text[position : position + 20])
        position = match.end()
        kind = match.lastgroup or ""
        if match["text"] is not None:
            tokens.append(Token("text", match["words"]))
        elif kind != "space":
            tokens.append(Token(kind, match[0]))
        if len(tokens) > MAX_TOKENS:
            raise TooLarge("too long")
    return tokens


def _end_of_environment(text: str, position: int) -> re.Match[str]:
    depth = 1
    for match in _END.finditer(text, position):
        depth += 1 if match[1] == "begin" else -1
        if depth == 0:
            return match
    raise Unreadable("an environment that never ends")
