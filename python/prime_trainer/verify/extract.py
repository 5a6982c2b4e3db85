r"""Finds the answer of a response: what it puts in `\boxed{...}`, or the last that looks like an answer."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW = 200_000
"""Characters at the end of a response in which the box is looked for."""

_OPENING = re.compile(r"\\f?box(?:ed)?[ \t]*\{")
_BRACE = re.compile(r"\\{1,2}f?box(?:ed)?[ \t]*\{|\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"\\f?box(?:ed)?[ \t]+([-+]?\d[\d.,/]*|\\?[A-Za-z]\w{0,20})")


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
    bare = [match[1] for match in _BARE.finditer(text, last[1] if last else 0)]
    if bare and not boxes:
        return bare[-1].rstrip(".,")
    return None if last is None else text[slice(*last)]


def without_draft(text: str) -> str:
    """What comes after the last `</think>`, without a later draft that never ends."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


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


MAX_PROGRAM_CHARS = 100_000
_OPEN_FENCE = re.compile(r"([ \t]*(?:(?:[-*+]|\d{1,3}[.)])[ \t]+)?(?:>[ \t]?)?)(`{3,}|~{3,})[ \t]*([^`\n]*)")
_LANGUAGE = re.compile(r"\{?\s*\.?\s*([A-Za-z][\w+#-]*)")
_PYTHON = frozenset(("python", "py", "python3", "py3", "python2", "ipython", "pypy", "pypy3", "python-3"))
_READS_INPUT = re.compile(r"\binput\s*\(|\bstdin\b|\bfileinput\b|\bopen\s*\(\s*0\b|\bos\s*\.\s*read\s*\(")


@dataclass(frozen=True)
class _Block:
    named: bool
    """Whether its fence names Python; a bare fence names nothing."""
    code: str


def programs(text: str, names: Sequence[str] = (), reads_input: bool = False) -> list[str]:
    """The fenced blocks that may be the program, the likeliest first; the sandbox takes the first that compiles.

    Blocks of other languages do not count, nor what stands in a draft between `<think>` and `</think>`. With `names`,
    the last block that defines one of them comes first; with `reads_input`, the last one that reads standard input.
    Then a fence that names Python comes before a bare one, and a later block before an earlier one.
    """
    blocks = list(reversed(_blocks(without_draft(text)[-4 * MAX_PROGRAM_CHARS :])))
    if names:
        words = "|".join(map(re.escape, names))
        wanted = re.compile(
            rf"^[ \t]*(?:async[ \t]+)?(?:def|class)[ \t]+(?:{words})\b|^(?:{words})[ \t]*(?::[^=\n]*)?=", re.MULTILINE
        )
    else:
        wanted = _READS_INPUT
    if not names and not reads_input:
        return [b.code for b in sorted(blocks, key=lambda block: not block.named)]
    found = {id(block): wanted.search(block.code) is not None for block in blocks}
    if names:
        return [b.code for b in sorted(blocks, key=lambda b: (not found[id(b)], not (found[id(b)] or b.named)))]
    return [b.code for b in sorted(blocks, key=lambda b: (not b.named, not found[id(b)]))]


def last_code_block(text: str) -> str | None:
    """The likeliest of `programs`, or None."""
    found = programs(text)
    return found[0] if found else None


def _blocks(text: str) -> list[_Block]:
    """The complete fenced blocks that name Python or nothing, in order. One pass over the lines.

    A fence that opens inside another with a language says that the other was never closed. The closing fence may stand
    at the end of a line of code.
    """
    found: list[_Block] = []
    fence, indent, language, lines = "", 0, "", list[str]()
    for line in text.replace("\r\n", "\n").split("\n"):
        stripped = line.strip()
        marked = stripped.startswith(("```", "~~~")) or (not fence and line.rstrip().count("```") + line.count("~~~"))
        opening = _OPEN_FENCE.fullmatch(line.rstrip()) if marked else None
        if fence and not (opening and opening[3].strip() and opening[2][0] == fence[0]):
            closing = len(stripped) - len(stripped.rstrip(fence[0]))
            if closing >= len(fence):
                if closing < len(stripped):
                    lines.append(line.rstrip()[:-closing])
                if language in _PYTHON or not language:
                    found.append(_Block(bool(language), _dedent(lines, indent)))
                fence = ""
            else:
                lines.append(line)
        elif opening:
            fence, indent, lines = opening[2], len(opening[1]), []
            named = _LANGUAGE.match(opening[3])
            language = named[1].lower() if named else ""
    return found


def _dedent(lines: Sequence[str], indent: int) -> str:
    """The code without the indentation of its fence, or of all its lines."""
    cut = [line[min(indent, len(line) - len(line.lstrip(" \t"))) :] for line in lines]
    return textwrap.dedent("".join(line + "\n" for line in cut))


def plain(latex: str) -> str:
    """The text without spacing and what else does not change its meaning: equal results are equal answers."""
    return re.sub(r"\s+|\\[,;!:]|\\left|\\right|\$", "", latex).rstrip(".").replace("dfrac", "frac")
