"""Turns the JSON of a benchmark run into what is committed: a table, and the numbers in it.

usage: python bench/table.py RESULTS.json bench/results/NAME [TITLE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prime_trainer.environment import environment

COLUMNS = ("GB/s", "TFLOP/s", "peak MiB")


def main(source: Path, target: Path, title: str) -> None:
    run = json.loads(source.read_text())
    groups: dict[str, list[dict]] = {}
    for one in run["benchmarks"]:
        groups.setdefault(one["group"], []).append(one)
    columns = [name for name in COLUMNS if any(name in one["extra_info"] for one in run["benchmarks"])]
    head = ["operation", "way", "median ms", *columns, "faster than eager", "faster than torch.compile"]
    lines = [head, ["---"] * len(head)]
    for group, members in groups.items():
        base = {way(one): one["stats"]["median"] for one in members}
        for one in members:
            median = one["stats"]["median"]
            ratios = [f"{base[name] / median:.1f}x" if name in base else "" for name in ("eager", "compile")]
            extra = [str(one["extra_info"].get(name, "")) for name in columns]
            lines.append([group, way(one), f"{median * 1e3:.2f}", *extra, *ratios])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    target.mkdir(parents=True, exist_ok=True)
    (target / "README.md").write_text(f"# {title}\n\n{table}\n\n{setting(run)}\n")
    numbers = [
        {"group": one["group"], "way": way(one), "seconds": one["stats"]["data"], **one["extra_info"]}
        for one in run["benchmarks"]
    ]
    (target / "results.json").write_text(
        json.dumps({"environment": environment(), "results": numbers}, indent=1) + "\n"
    )


def way(one: dict) -> str:
    label = (one["params"] or {}).get("way") or one["name"].split("[")[0].removeprefix("test_").replace("_", " ")
    label = f"{label}, {one['params']['tokens']} tokens" if "tokens" in (one["params"] or {}) else label
    return f"{label}, in place" if "in_place" in one["name"] else label


def setting(run: dict) -> str:
    device = next(iter({one["extra_info"]["device"] for one in run["benchmarks"]}))
    return f"{measured_on(device)} Peak MiB is what a call holds at once beyond its inputs."


def measured_on(device: str = "cpu") -> str:
    """One sentence: the machine, the versions and the commit."""
    here = environment()
    where = device if device != "cpu" else f"{here['cores']} cores of {here['processor']}"
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    sets = f" ({', '.join(here['vector_sets'])})" if device == "cpu" else ""
    return f"Measured in one run on {where}{sets}: Python {here['python']}, {packages}, commit {here['commit']}."


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) == 4 else Path(sys.argv[2]).name)
