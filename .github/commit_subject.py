"""Checks the subject of a commit message: `scope: imperative`, at most 72 characters. A hook of pre-commit."""

import re
import sys
from pathlib import Path

LONGEST = 72


def fault(message: str) -> str | None:
    """What is wrong with the subject of `message`; None if nothing is."""
    subject = message.partition("\n")[0]
    if subject.startswith(("Merge ", "Revert ", "fixup! ", "squash! ")):
        return None
    if len(subject) > LONGEST:
        return f"the subject has {len(subject)} characters, at most {LONGEST}"
    if not re.match(r"[a-z][\w/.-]*: [a-z]\w+", subject) or subject.endswith("."):
        return f"the subject must read `scope: imperative`, such as `docs: list units`, got {subject!r}"
    return None


if __name__ == "__main__":
    sys.exit(fault(Path(sys.argv[1]).read_text(encoding="utf-8")))
