"""Troubleshooting quotes messages as the code has them, and misses no kind of error that ends a run."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
CODE = [path for folder in ("prime_kernels", "python/prime_trainer") for path in sorted((ROOT / folder).rglob("*.py"))]
# Names of keys, metrics and files in the column of messages; no messages.
NAMES = {"prm_pair_accuracy", "verifier_timeouts", "argument: expected .., got .."}


def texts(path: Path) -> list[str]:
    """Every string of a file; the parts of an f-string, or of strings that are added up, with a NUL in each gap."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def messages() -> list[str]:
    first = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| ")]
    return [name for cell in first for name in re.findall(r"`([^`]+)`", cell) if name not in NAMES]


def test_messages_are_in_the_code():
    strings = [text for path in CODE for text in texts(path)]
    found = messages()
    assert len(found) > 60
    lost = []
    for message in found:
        # `..` stands for text of any length, a value or a few words of a longer message.
        parts = [re.escape(part) for part in re.split(r"\.\.+(?= |$|[:,)\]])|^\.\.|\.\.(?=[a-z])", message)]
        pattern = re.compile(r".*?".join(parts), re.DOTALL)
        if not any(pattern.search(text) for text in strings):
            lost.append(message)
    assert not lost, lost
