"""Rows of measurements as a table, verdicts, a picture and the tuning of the device."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prime_kernels._bench.cases import EAGER

# Closer than this, two medians of a noisy machine are level.
LEVEL = 1.03
NO_TIME = "no time was left"


@dataclasses.dataclass
class Row:
    """One way to compute one pass of an operation at one size: measured, or why not."""

    op: str
    which: str
    """The pass."""
    size: str
    level: int
    """0 for the smallest size."""
    way: str
    ours: bool
    seconds: float | None = None
    rounds: int = 0
    of_ceiling: float | None = None
    """Time of the least work at the measured rates over the time taken; what stays in a cache can be above 1."""
    peak: int | None = None
    """Bytes beyond inputs."""
    error: float | None = None
    """Largest relative error against float64, at the smallest size."""
    failure: str | None = None


def table(rows: list[Row]) -> str:
    """Text columns; times relative to eager of the same size."""
    head = ["operation", "size", "way", "ms", "x eager", "of ceiling", "peak MiB", "error"]
    lines = [head]
    eager = {(row.op, row.which, row.level): row.seconds for row in rows if row.way == EAGER}
    for row in rows:
        name = f"{row.op}, {row.which}"
        if row.failure == NO_TIME:
            continue
        if row.seconds is None:
            lines.append([name, row.size, row.way, row.failure or "", "", "", "", ""])
            continue
        base = eager.get((row.op, row.which, row.level))
        lines.append(
            [
                name,
                row.size,
                row.way,
                f"{row.seconds * 1e3:.3g}",
                "" if base is None else f"{base / row.seconds:.2f}",
                "" if row.of_ceiling is None else f"{row.of_ceiling:.2f}",
                "" if row.peak is None else f"{row.peak / 2**20:.1f}",
                "" if row.error is None else f"{row.error:.0e}",
            ]
        )
    # What failed has words in the place of a time, which are not to widen the column of all others.
    widths = [max(len(line[n]) for line in lines if n != 3 or line[4] or line is head) for n in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def unmeasured(rows: list[Row]) -> str | None:
    """One sentence about what there was no time for; None if there was for all."""
    found: dict[str, int] = {}
    for row in rows:
        if row.failure == NO_TIME:
            found[row.way] = found.get(row.way, 0) + 1
    if not found:
        return None
    ways = ", ".join(f"{number} of {way}" for way, number in found.items())
    return f"Not measured, as no time was left: {ways}. --minutes gives more."


def verdicts(rows: list[Row]) -> dict[str, str]:
    """For each operation and pass one sentence, of the largest size at which ours and others were measured."""
    found = {}
    for op, which in dict.fromkeys((row.op, row.which) for row in rows):
        of_pass = [row for row in rows if (row.op, row.which) == (op, which)]
        measured = [row for row in of_pass if row.seconds is not None]
        ours, others = ({row.level for row in measured if row.ours is own} for own in (True, False))
        at = [row for row in of_pass if row.level == max(ours & others or ours, default=0)]
        found[f"{op}, {which}"] = _verdict(at)
    return found


def _verdict(rows: list[Row]) -> str:
    ours = _fastest(row for row in rows if row.ours)
    others = _fastest(row for row in rows if not row.ours)
    if ours is None:
        return "not measured"
    tried = sum(row.seconds is not None for row in rows)
    if others is None:
        failed = [f"{row.way}: {row.failure}" for row in rows if not row.ours]
        return f"{ours.way} alone at {ours.size}" + (f" ({'; '.join(failed)})" if failed else "")
    assert ours.seconds is not None and others.seconds is not None
    ratio = others.seconds / ours.seconds
    where = f"at {ours.size}"
    if 1 / LEVEL <= ratio <= LEVEL:
        return f"{ours.way} and {others.way} are level {where}"
    if ratio > 1:
        return f"{ours.way} is the fastest of {tried} tried, {ratio:.2f} times as fast as {others.way} {where}"
    return f"{others.way} is faster: {1 / ratio:.2f} times as fast as {ours.way} {where}"


def _fastest(rows: Iterable[Row]) -> Row | None:
    measured = [row for row in rows if row.seconds is not None]
    return min(measured, key=lambda row: row.seconds or 0.0, default=None)


def best_backends(rows: list[Row]) -> dict[str, str]:
    """The fastest backend of each operation over the sizes and passes at which all of its backends were measured."""
    found = {}
    for op in dict.fromkeys(row.op for row in rows):
        cells: dict[tuple[str, int], dict[str, float]] = {}
        for row in rows:
            if row.op == op and row.ours and row.seconds is not None:
                cells.setdefault((row.which, row.level), {})[row.way] = row.seconds
        names = {name for cell in cells.values() for name in cell}
        whole = [cell for cell in cells.values() if set(cell) == names]
        if whole:
            found[op] = min(sorted(names), key=lambda name: sum(math.log(cell[name]) for cell in whole))
    return found


def picture(rows: list[Row], title: str, path: Path) -> str | None:
    """Bars of how many times as fast as eager, a pass each, at the largest size; None, or why there is no picture."""
    try:
        import matplotlib
    except ImportError as error:
        return f"no picture: matplotlib cannot be imported ({error}); install it with: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bars = _bars(rows)
    ways = list(dict.fromkeys(way for of_ways in bars.values() for way in of_ways))
    figure, axes = pyplot.subplots(
        figsize=(9, 1.4 + 0.22 * sum(1 + len(each) for each in bars.values())), layout="constrained"
    )
    place, ticks = 0.0, []
    for name, of_ways in bars.items():
        ticks.append((place + (len(of_ways) - 1) / 2, name))
        for way, ratio in of_ways.items():
            bar = axes.barh(place, ratio, height=0.9, color=f"C{ways.index(way)}", label=way)
            axes.bar_label(bar, [f"{ratio:.2f}x"], padding=3, fontsize=7)
            place += 1.0
        place += 0.6
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.15)
    axes.set_xlabel("times as fast as eager PyTorch")
    axes.set_title(title, fontsize=9)
    labels: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        labels.setdefault(label, handle)
    axes.legend(labels.values(), labels, loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return None


def _bars(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Times as fast as eager by pass and way, at the largest size at which eager and another were measured."""
    cells: dict[tuple[str, str], dict[int, dict[str, Row]]] = {}
    for row in rows:
        if row.seconds is not None:
            cells.setdefault((row.op, row.which), {}).setdefault(row.level, {})[row.way] = row
    found = {}
    for (op, which), levels in sorted(cells.items()):
        fitting = [level for level, ways in levels.items() if EAGER in ways and len(ways) > 1]
        if not fitting:
            continue
        ways = levels[max(fitting)]
        base = ways.pop(EAGER)
        found[f"{op}, {which}\n{base.size}"] = {
            way: base.seconds / row.seconds for way, row in ways.items() if base.seconds and row.seconds
        }
    return found
