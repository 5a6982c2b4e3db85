"""Turns the report of `make faults` (JUnit XML) into what is committed: what was tried, and whether it held.

usage: python bench/faults_table.py REPORT.xml bench/results/faults
"""

from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from table import measured_on

KILLED = re.compile(r"^(\w+): (killed|already ended) after ([\d.]+) s of ([\d.]+) s$", re.MULTILINE)
# (heading, the files of its tests, what was tried)
PARTS = (
    ("Kills", ("run.test_kills",), "SIGKILL at a random moment, then the command again: bit for bit the same files"),
    ("Faults of a run", ("scale.test_faults", "run.test_endings"),
     "torn checkpoints, a full disk, NaN, dead ranks, signals, dead readers, a removed output, replaced models"),
    ("Locks", ("run.test_output_lock",), "a second process in the output folder of every command that writes one"),
    ("Hidden code", ("trainer.test_payloads",), "payloads in checkpoints, models, tokenizers, caches; every command"),
    ("Broken inputs", ("trainer.test_broken_inputs",),
     "every command with damaged files, settings and places: exit 2, one line with file and place, no traceback"),
    ("Hostile programs", ("verify.",), "programs and answers that forge verdicts, look around, do harm or never end"),
)  # fmt: skip


def main(report: Path, target: Path) -> None:
    cases = list(ElementTree.parse(report).iter("testcase"))
    lines = ["| what | tried | held | failed | skipped | how |", "| --- | --: | --: | --: | --: | --- |"]
    failures: list[str] = []
    for heading, files, how in PARTS:
        found = [case for case in cases if any(file in case.get("classname", "") + "." for file in files)]
        ends = Counter(outcome(case) for case in found)
        failures += [f"{case.get('classname')}.{case.get('name')}" for case in found if outcome(case) == "failed"]
        tried = len(found) - ends["skipped"]
        lines.append(f"| {heading} | {tried} | {ends['held']} | {ends['failed']} | {ends['skipped']} | {how} |")
    text = "# Faults\n\n" + "\n".join(lines) + "\n\n" + kills(cases)
    if failures:
        text += "\nFailed:\n\n" + "".join(f"* `{name}`\n" for name in failures)
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text(f"{text}\nBy `make faults`. {measured_on()}\n")


def outcome(case: ElementTree.Element) -> str:
    if case.find("skipped") is not None:
        return "skipped"
    return "held" if case.find("failure") is None and case.find("error") is None else "failed"


def kills(cases: list[ElementTree.Element]) -> str:
    """The moments of the kills by command."""
    moments: dict[str, list[str]] = {}
    for case in cases:
        for command, how, after, lasted in KILLED.findall(case.findtext("system-out") or ""):
            late = "" if how == "killed" else ", ended before"
            held = "" if outcome(case) == "held" else ", FAILED"
            moments.setdefault(command, []).append(f"{float(after) / float(lasted):.0%}{late}{held}")
    rows = [f"| `{command}` | {len(found)} | {'; '.join(found)} |" for command, found in moments.items()]
    return "\n".join(["| command | kills | when, as a share of the whole run |", "| --- | --: | --- |", *rows]) + "\n"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
