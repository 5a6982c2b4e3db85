"""Where the steps of a response begin, and which tokens are theirs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from ..config.action_prompt import ACTIONS
from ..config.sections import Splitter

_STARTS: dict[Splitter, re.Pattern[str]] = {
    "blank_line": re.compile(r"\n[ \t]*\n\s*"),
    "line": re.compile(r"\n\s*"),
}
_MARKERS: dict[Splitter, re.Pattern[str]] = {
    "numbered": re.compile(r"^[ \t]*(?:#+[ \t]*|\*\*)?Step[ \t]+\d+[ \t]*[:.)]", re.MULTILINE | re.IGNORECASE),
    "action": re.compile(rf"^[ \t]*\[(?:{'|'.join(ACTIONS)})\]", re.MULTILINE),
}


def split(text: str, how: Splitter) -> list[str]:
    """Cuts `text` into steps whose concatenation is `text`; what stands between two steps ends the first of them.

    `how`: blank_line, line, numbered ("Step 2:"), action ("[VERIFY]") or none. Text without anything but white space
    is one step.
    """
    if how in _STARTS:
        starts = [match.end() for match in _STARTS[how].finditer(text)]
    elif how in _MARKERS:
        starts = [match.start() for match in _MARKERS[how].finditer(text)]
    elif how == "none":
        starts = []
    else:
        raise ValueError(f"splitter must be one of {', '.join(get_args(Splitter))}, got {how!r}")
    parts: list[str] = []
    for start, end in zip([0, *starts], [*starts, len(text)], strict=True):
        part = text[start:end]
        if parts and not (part.strip() and parts[-1].strip()):
            parts[-1] += part
        elif part or not starts:
            parts.append(part)
    return parts


def joined(steps: Sequence[str]) -> list[str]:
    """Given steps as parts of the response: a blank line ends every step but the last."""
    for k, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise ValueError(f"steps[{k}] must be a non-empty string, got {step!r:.100}")
    return [step + "\n\n" for step in steps[:-1]] + [steps[-1]]


def token_counts(parts: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens of each part, given the characters that each token covers.

    A token belongs to the part in which its first character other than white space lies (a token of white space alone:
    its first character), so no part loses a token to the end of the one before it.
    """
    text = "".join(parts)
    ends: list[int] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + len(part))
    counts, k = [0] * len(parts), 0
    for start, end in spans:
        inked = start + len(text[start:end]) - len(text[start:end].lstrip())
        at = inked if inked < end else start
        while k + 1 < len(parts) and at >= ends[k]:
            k += 1
        counts[k] += 1
    return counts


def without_empty(parts: Sequence[str], counts: Sequence[int]) -> tuple[list[str], list[int]]:
    """Joins parts without a token of their own to their neighbours: they would have no reward."""
    kept: list[tuple[str, int]] = []
    for part, count in zip(parts, counts, strict=True):
        if kept and (count == 0 or kept[-1][1] == 0):
            before, own = kept.pop()
            part, count = before + part, own + count
        kept.append((part, count))
    return [part for part, _ in kept], [count for _, count in kept]
