"""The report's figures where runs differ in more than their seed: a colour an arm, its mean and range over seeds."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import Arm, Comparison
from .plots import STAGES, TIME, Figure, Line, Theme, close_figure, mean_of, open_figure, running_mean, smoothing

_STYLES = ("-", ":")
"""Of a figure's lines, the same for all arms but those whose colour comes a second time."""
_CROWD = 5
"""Arms from which on a figure has its first line alone, and pale bands."""


def draw_arms(figure: Figure, found: Comparison, theme: Theme, *, titled: bool = False) -> bytes:
    """Returns the figure as PNG. A line is the mean of an arm's runs at the steps that all of them have; the band goes
    from their lowest to their highest."""
    canvas, axes = open_figure(figure, theme, titled=titled)
    widest = max(len(arm.name) for arm in found.arms)
    if figure is TIME:
        axes.set_xlabel("seconds a step, mean", color=theme.muted, fontsize=9)
        axes.set_ylabel("")
        axes.grid(visible=False)
        left = [0.0] * len(found.arms)
        rows = list(range(len(found.arms)))[::-1]
        colours = (*_colours(theme, len(STAGES)), theme.colours[-1])
        for stage, colour in zip((*STAGES, "other"), colours, strict=True):
            spent = [_seconds(arm, stage) for arm in found.arms]
            if any(spent):
                axes.barh(rows, spent, left=left, height=0.6, color=colour, label=stage, linewidth=0)
                left = [start + own for start, own in zip(left, spent, strict=True)]
        axes.set_yticks(rows, [arm.name for arm in found.arms])
        axes.yaxis.set_tick_params(labelsize=9 if widest < 24 else 7)
        return close_figure(canvas, axes, figure, theme)
    shown = [line for line in figure.lines if any(_runs(line, arm) for arm in found.arms)]
    crowded = len(found.arms) >= _CROWD
    shown = shown[:1] if crowded else shown
    for k, (arm, colour) in enumerate(zip(found.arms, _colours(theme, len(found.arms)), strict=True)):
        again = k >= len(theme.colours)
        for line, style in zip(shown, ("--" if again else _STYLES[0], *_STYLES[1:]), strict=False):
            runs = _runs(line, arm)
            if not runs:
                continue
            steps, values = mean_of(runs)
            tables = [dict(zip(*run, strict=True)) for run in runs]
            low, high = ([end(table[step] for table in tables) for step in steps] for end in (min, max))
            window = smoothing(line, len(steps))
            values, low, high = (running_mean(each, window) for each in (values, low, high))
            first = line is shown[0]
            axes.plot(
                steps, values, style, color=colour, linewidth=2.2 if first else 1.3, zorder=3,
                marker="o" if first and (line.stage == "eval" or window == 1) else None, markersize=3,
                label=arm.name if first else None,
            )  # fmt: skip
            if first and len(runs) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.06 if crowded else 0.15, linewidth=0)
    if len(shown) > 1:
        for line, style in zip(shown, _STYLES, strict=False):
            axes.plot([], [], style, color=theme.muted, linewidth=1.3, label=line.label)
    return close_figure(canvas, axes, figure, theme, columns=max(1, min(4, 64 // (widest + 6))), told=1)


def _colours(theme: Theme, count: int) -> list[str]:
    """The theme's, again from the first where there are more arms."""
    return [theme.colours[k % len(theme.colours)] for k in range(count)]


def _runs(line: Line, arm: Arm) -> list[tuple[list[int], list[float]]]:
    return [series for record in arm.records if (series := record.series(line.stage, line.key))[0]]


def _seconds(arm: Arm, stage: str) -> float:
    """A step's mean over all steps of the arm's runs; `other` is what no stage accounts for."""
    total = _mean([value for record in arm.records for value in record.series("rl", "time/total")[1]])
    if stage != "other":
        steps = sum(len(record.series("rl", "time/total")[0]) for record in arm.records)
        spent = sum(sum(record.series("rl", f"time/{stage}")[1]) for record in arm.records)
        return spent / max(1, steps)
    return max(0.0, total - sum(_seconds(arm, each) for each in STAGES))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
