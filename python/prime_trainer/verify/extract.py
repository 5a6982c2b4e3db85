r"""Finds the answer of a response: what it puts in `\boxed{...}`, or the last that looks like an answer."""

from __future__ import annotations

import re

WINDOW = 200_000
"""Characters at the end of a response in which the box is looked for."""

_OPENING = re.compile(r"\\f?boxed?[ \t]*\{")
_BRACE = re.compile(r"\\f?boxed?[ \t]*\{|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\f?boxed?[ \t]+([-+]?\d[\d.,/]*|\\?[A-Za-z]\w{0,20})")


def last_boxed(text: str) -> str | None:
    r"""Returns the content of the last complete `\boxed{...}`, or None.

    `\fbox{5}`, `\boxed {5}` and, where there is no brace, `\boxed 5` are boxes, too. Braces nest; a brace behind a
    backslash (`\{`) is text. A box that never closes (a truncated response) does not count, the one before it does. A
    box in a draft between `<think>` and `</think>` is not the answer. One pass over the last `WINDOW` characters, so
    the time is bounded whatever the text is.
    """
    text = without_draft(text)[-WINDOW:]
    last: tuple[int, int] | None = None
    boxes: list[tuple[int, int]] = []  # (depth outside, start of the content) of the boxes that are open
    depth = 0
    first = _OPENING.search(text)
    for match in _BRACE.finditer(text, first.start()) if first else ():
        token = match.group()
        if token[-1] == "{" and token != "\\{":
            if len(token) > 1:
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
    bare = None
    for bare in _BARE.finditer(text, last[1] if last else 0):
        pass
    if bare is not None and not boxes:
        return bare[1].rstrip(".,")
    return None if last is None else text[slice(*last)]


def without_draft(text: str) -> str:
    """What comes after the last `</think>`; the whole text where there is none."""
    return text.rpartition("</think>")[2]


_TAIL = 2_000
_FORMULA = re.compile(
    r"\$\$?([^$]{1,200})\$\$?|\\\(([^$]{1,200}?)\\\)|\\\[([^$]{1,200}?)\\\]|([-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:/\d+)?%?)"
)


def last_answer(text: str) -> str | None:
    r"""Returns the last formula (`$..$`, `\(..\)`, `\[..\]`) or number of a response that has no box, or None.

    Of `x = 5` the right side counts. For models that were never told to use a box; looked for in the last `_TAIL`
    characters.
    """
    found = list(_FORMULA.finditer(without_draft(text)[-_TAIL:]))
    if not found:
        return None
    formula = next(group for group in found[-1].groups() if group is not None)
    return formula.rpartition("=")[2].strip().rstrip(".,") or None


def plain(latex: str) -> str:
    """The text without spacing and what else does not change its meaning: equal results are equal answers."""
    return re.sub(r"\s+|\\[,;!:]|\\left|\\right|\$", "", latex).rstrip(".").replace("dfrac", "frac")
