r"""Finds the answer of a response: what it puts in `\boxed{...}`, or the last that looks like an answer."""

from __future__ import annotations

import re

WINDOW = 200_000
"""Characters at the end of a response in which the box is looked for."""

_OPENING = r"\boxed{"
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{...}`, or None.

    Braces nest; a brace behind a backslash (`\{`) is text. A box that never closes (a truncated response) does not
    count, the one before it does. One pass over the last `WINDOW` characters, so the time is bounded whatever the
    text is.
    """
    text = text[-WINDOW:]
    last: tuple[int, int] | None = None
    boxes: list[tuple[int, int]] = []  # (depth outside, start of the content) of the boxes that are open
    depth = 0
    cursor = text.find(_OPENING)
    if cursor < 0:
        return None
    for match in _BRACE.finditer(text, cursor):
        token = match.group()
        if token == "{":
            if text.startswith(_OPENING, match.start() - len(_OPENING) + 1):
                boxes.append((depth, match.end()))
            depth += 1
        elif token == "}":
            depth -= 1
            if boxes and boxes[-1][0] == depth:
                start = boxes.pop()[1]
                # An outer box closes after the boxes inside it and holds the whole answer.
                last = (start, match.start())
            elif not boxes:
                depth = 0  # a stray closing brace in the prose
    return None if last is None else text[slice(*last)]


_TAIL = 2_000
_FORMULA = re.compile(
    r"\$\$?([^$]{1,200})\$\$?|\\\(([^$]{1,200}?)\\\)|\\\[([^$]{1,200}?)\\\]|([-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?%?)"
)


def last_answer(text: str) -> str | None:
    r"""Returns the last formula (`$..$`, `\(..\)`, `\[..\]`) or number of a response that has no box, or None.

    Of `x = 5` the right side counts. For models that were never told to use a box; looked for in the last `_TAIL`
    characters.
    """
    found = list(_FORMULA.finditer(text[-_TAIL:]))
    if not found:
        return None
    formula = next(group for group in found[-1].groups() if group is not None)
    return formula.rpartition("=")[2].strip().rstrip(".,") or None
