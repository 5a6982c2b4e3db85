"""Turns the JSON of a benchmark run into what is committed: a table, a picture of it, and the numbers.

usage: python bench/table.py RESULTS.json [MORE.json ..] bench/results/NAME [TITLE]

Several files are one table, for benchmarks that were run part by part on one machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from prime_trainer.run.provenance import environment

RATES = ("GB/s", "TFLOP/s")
COLUMNS = (*RATES, "of ceiling", "peak MiB", "worst error")
CEILING = "ceiling: "
# What is drawn: ours. Others of the same group are what it is compared with.
OURS = ("cpu", "triton", "cuda", "kernel")


def main(sources: list[Path], target: Path, title: str) -> None:
    run = {"benchmarks": [one for source in sources for one in json.loads(source.read_text())["benchmarks"]]}
    groups: dict[str, list[dict]] = {}
    for one in run["benchmarks"]:
        groups.setdefault(one["group"], []).append(one)
    highest = ceilings(run)
    for one in run["benchmarks"]:
        info = one["extra_info"]
        for rate in RATES:
            if rate in info and rate in highest:
                info["of ceiling"] = f"{info[rate] / highest[rate]:.2f}"
    columns = [name for name in COLUMNS if any(name in one["extra_info"] for one in run["benchmarks"])]
    head = ["operation", "way", "median ms", *columns, "faster than eager", "faster than torch.compile"]
    lines, faster = [head, ["---"] * len(head)], {}
    for group, members in groups.items():
        base = {way(one): one["stats"]["median"] for one in members}
        for one in members:
            median = one["stats"]["median"]
            found = {name: base[name] / median for name in ("eager", "compile") if name in base}
            ratios = [f"{found[name]:.1f}x" if name in found else "" for name in ("eager", "compile")]
            extra = [str(one["extra_info"].get(name, "")) for name in columns]
            lines.append([group, way(one), f"{median * 1e3:.2f}", *extra, *ratios])
            if way(one) in OURS and found:
                faster[f"{group} ({way(one)})"] = found
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    target.mkdir(parents=True, exist_ok=True)
    shown = "![How many times as fast as eager PyTorch and as torch.compile](table.png)\n\n" if faster else ""
    (target / "README.md").write_text(f"# {title}\n\n{shown}{table}\n\n{setting(run)}\n")
    numbers = [
        {"group": one["group"], "way": way(one), "seconds": one["stats"]["data"], **one["extra_info"]}
        for one in run["benchmarks"]
    ]
    (target / "results.json").write_text(
        json.dumps({"environment": environment(), "results": numbers}, indent=1) + "\n"
    )
    if faster:  # last, as it needs a package more
        picture(faster, title, target / "table.png")


def ceilings(run: dict) -> dict[str, float]:
    """The highest rates that bench/test_ceiling.py got in this run; empty where it did not run."""
    found: dict[str, float] = {}
    for one in run["benchmarks"]:
        for rate in RATES:
            # Operations are timed on bfloat16 products; float32 is beside it for those who train in it.
            if one["group"].startswith(CEILING) and rate in one["extra_info"] and "float32" not in one["name"]:
                found[rate] = max(found.get(rate, 0.0), one["extra_info"][rate])
    return {rate: value for rate, value in found.items() if value > 0}


def picture(faster: dict[str, dict[str, float]], title: str, path: Path) -> None:
    """Bars of how many times as fast as eager and torch.compile, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.42 * len(faster)), layout="constrained")
    names = list(faster)[::-1]
    for other, shift, colour in (("eager", 0.2, "#1f6fb4"), ("compile", -0.2, "#e08a1e")):
        label = f"than {'torch.compile' if other == 'compile' else other}"
        places = [place for place, name in enumerate(names) if other in faster[name]]
        values = [faster[names[place]][other] for place in places]
        bars = axes.barh([place + shift for place in places], values, height=0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{value:.1f}x" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast")
    axes.set_title(title)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def way(one: dict) -> str:
    params = one["params"] or {}
    label = params.get("way") or one["name"].split("[")[0].removeprefix("test_").replace("_", " ")
    label = f"{label}, {params['tokens']} tokens" if "tokens" in params else label
    label = f"{label}, {one['name'].split('[')[1][:-1]}" if "dtype" in params else label
    return f"{label}, in place" if "in_place" in one["name"] else label


def setting(run: dict) -> str:
    device = next(iter({one["extra_info"]["device"] for one in run["benchmarks"]}))
    ceiling = (
        " Of ceiling: GB/s over that of a copy, or TFLOP/s over that of a bfloat16 product, both in this table; what "
        "stays in a cache can be above 1."
        if ceilings(run)
        else ""
    )
    return f"{measured_on(device)} Peak MiB is what a call holds at once beyond its inputs.{ceiling}"


def measured_on(device: str = "cpu") -> str:
    """One sentence: the machine, the versions and the commit."""
    here = environment()
    where = device if device != "cpu" else f"{here['cores']} cores of {here['processor']}"
    packages = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
    sets = f" ({', '.join(here['vector_sets'])})" if device == "cpu" else ""
    return f"Measured in one run on {where}{sets}: Python {here['python']}, {packages}, commit {here['commit']}."


if __name__ == "__main__":
    files = [Path(word) for word in sys.argv[1:] if word.endswith(".json")]
    rest = sys.argv[1 + len(files) :]
    if not files or len(rest) not in (1, 2):
        sys.exit(__doc__)
    main(files, Path(rest[0]), rest[-1] if len(rest) == 2 else Path(rest[0]).name)
