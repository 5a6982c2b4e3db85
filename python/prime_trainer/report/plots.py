"""The report's figures. Each is drawn twice, for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .run_record import Record
from .statistics import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


@dataclass(frozen=True)
class Line:
    stage: str
    key: str
    label: str


@dataclass(frozen=True)
class Figure:
    """What a figure shows. `unit` labels the y axis."""

    name: str
    title: str
    caption: str
    unit: str
    lines: tuple[Line, ...]
    share: bool = False
    """The values are shares: the axis is in percent."""
    chance: float | None = None
    """A dashed line at what guessing would give."""


@dataclass(frozen=True)
class Theme:
    name: str
    face: str
    ink: str
    muted: str
    grid: str
    colours: tuple[str, ...]


# Told apart by readers with any colour vision; the dark set is the same hues, lighter.
LIGHT = Theme(
    "light", "#ffffff", "#1c2430", "#5b6675", "#e6e9ee",
    ("#2463c9", "#d9630b", "#0f8a6d", "#a13d96", "#b58a00", "#8a93a0"),
)  # fmt: skip
DARK = Theme(
    "dark", "#171c24", "#e8ecf2", "#9aa6b5", "#2a323e",
    ("#6ea8ff", "#ff9d57", "#4fd1ae", "#e08ad6", "#e6c34d", "#7f8a99"),
)  # fmt: skip

STAGES = ("rollout", "verify", "score", "prm", "policy", "weights")
TIME = Figure(
    "time", "Time per step", "Seconds that each stage of a step took.", "seconds",
    tuple(Line("rl", f"time/{stage}", stage) for stage in STAGES),
)  # fmt: skip
FIGURES = (
    Figure(
        "reward", "Reward while training",
        "Mean outcome of all sampled responses, and of the groups that the filter kept for the update.", "mean outcome",
        (Line("rl", "reward", "all samples"), Line("rl", "kept_reward", "kept groups")), share=True,
    ),
    Figure(
        "accuracy", "Held-out accuracy",
        "Problems that training never shows. Step 0 is the model that RL started from; of a single run, the band is "
        "the 95 % Wilson interval of the greedy accuracy.", "accuracy",
        (Line("eval", "greedy", "greedy"), Line("eval", "sampled", "sampled")), share=True,
    ),
    Figure(
        "prm_loss", "PRM loss", "Loss of the online update of the implicit process reward model.", "loss",
        (Line("rl", "prm_loss", "PRM loss"),),
    ),
    Figure(
        "prm_pair_accuracy", "PRM pair accuracy",
        "How often the PRM ranks the better of two responses to a prompt higher; guessing gives one half.", "accuracy",
        (Line("rl", "prm_pair_accuracy", "pair accuracy"),), share=True, chance=0.5,
    ),
    Figure(
        "kl", "KL to the rollout policy", "Estimated divergence of the updated policy from the one that sampled.",
        "nats", (Line("rl", "approx_kl", "approximate KL"),),
    ),
    Figure(
        "mismatch", "Rollout mismatch",
        "Difference of the trainer's and the engine's log-probs of the sampled tokens: mean, and the k3 estimate of "
        "the divergence.", "nats per token",
        (Line("rl", "mismatch", "mean difference"), Line("rl", "mismatch_kl", "KL")),
    ),
    Figure(
        "clip_fraction", "Clip fraction", "Share of response tokens whose probability ratio was clipped.",
        "share of tokens", (Line("rl", "clip_fraction", "clip fraction"),), share=True,
    ),
    Figure("entropy", "Entropy", "Mean entropy of the policy at response tokens.", "nats per token",
           (Line("rl", "entropy", "entropy"),)),
    Figure("response_length", "Response length", "Mean tokens of a sampled response.", "tokens",
           (Line("rl", "response_length", "response length"),)),
    Figure("truncated", "Truncated responses", "Share of samples cut off at the length limit.", "share of samples",
           (Line("rl", "truncated", "truncated"),), share=True),
    TIME,
    Figure("groups", "Groups", "Prompt groups sampled in a step, and kept for the update.", "groups a step",
           (Line("rl", "groups_sampled", "sampled"), Line("rl", "groups_kept", "kept"))),
    Figure("sft_loss", "SFT loss", "Cross-entropy of the supervised warm-up.", "nats per token",
           (Line("sft", "loss", "loss"),)),
)  # fmt: skip

_SMOOTH_FROM = 30  # points from which a running mean is drawn over the noise


def has_data(figure: Figure, records: Sequence[Record]) -> bool:
    """Whether any run logged anything that the figure shows."""
    return any(record.series(line.stage, line.key)[0] for record in records for line in figure.lines)


def draw(figure: Figure, records: Sequence[Record], theme: Theme, *, titled: bool = False) -> bytes:
    """Returns the figure as PNG. `records[0]` is the run; with more, thin lines are runs and thick ones their mean.

    `titled` writes the title into the picture, for one that stands alone.
    """
    canvas, axes = open_figure(figure, theme, titled=titled)
    if figure is TIME:
        _stack(axes, records[0], theme)
    else:
        for line, colour in zip(figure.lines, theme.colours, strict=False):
            _draw_line(axes, line, records, colour)
    return close_figure(canvas, axes, figure, theme)


def open_figure(figure: Figure, theme: Theme, *, titled: bool) -> tuple[Canvas, Axes]:
    """An empty picture and its axes, styled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    canvas = Canvas(figsize=(6.4, 3.6), dpi=150, facecolor=theme.face, layout=layout)
    FigureCanvasAgg(canvas)
    if titled:
        canvas.suptitle(figure.title, x=0.02, ha="left", fontsize=12, fontweight="bold", color=theme.ink)
    axes = canvas.add_subplot()
    _style(axes, figure, theme)
    return canvas, axes


def close_figure(canvas: Canvas, axes: Axes, figure: Figure, theme: Theme, columns: int = 6, told: int = 2) -> bytes:
    """The picture as PNG; a legend of at most `columns` columns where there are `told` things to tell apart."""
    if figure.chance is not None:
        axes.axhline(figure.chance, color=theme.muted, linestyle="--", linewidth=1, label="guessing")
    _limits(axes, figure)
    labels = axes.get_legend_handles_labels()[1]
    if len(labels) >= told:
        # Above the plot, where it cannot cover a line.
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, frameon=False, fontsize=9,
            labelcolor=theme.ink, borderaxespad=0.2, columnspacing=1.3, handlelength=1.5,
        )  # fmt: skip
    png = io.BytesIO()
    canvas.savefig(png, format="png", facecolor=theme.face, metadata={"Software": None})
    return png.getvalue()


def _draw_line(axes: Axes, line: Line, records: Sequence[Record], colour: str) -> None:
    runs = [series for record in records if (series := record.series(line.stage, line.key))[0]]
    if not runs:
        return
    for steps, values in runs if len(runs) > 1 else ():
        axes.plot(steps, values, color=colour, linewidth=0.9, alpha=0.4)
    steps, values = mean_of(runs)
    label = line.label if len(runs) == 1 else f"{line.label}, mean of {len(runs)} runs"
    evaluated = line.stage == "eval"
    if (window := smoothing(line, len(steps))) > 1:
        if len(runs) == 1:
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        values, label = running_mean(values, window), f"{label} (over {window} steps)"
    marker = "o" if evaluated or len(steps) < _SMOOTH_FROM else None
    axes.plot(steps, values, color=colour, linewidth=2.2, marker=marker, markersize=4, label=label, zorder=3)
    if line.key == "greedy" and len(runs) == 1:
        record = next(record for record in records if record.series(line.stage, line.key)[0])
        counted = [(s, v, record.metrics["eval"][s].get("n")) for s, v in zip(steps, values, strict=True)]
        bounds = [(s, *wilson(v, int(n))) for s, v, n in counted if n]
        if bounds:
            at, low, high = (list(column) for column in zip(*bounds, strict=True))
            axes.fill_between(at, low, high, color=colour, alpha=0.14, linewidth=0)


def _stack(axes: Axes, record: Record, theme: Theme) -> None:
    steps, totals = record.series("rl", "time/total")
    if not steps:
        steps = sorted(record.metrics.get("rl", {}))
    base = [0.0] * len(steps)
    for stage, colour in zip(STAGES, theme.colours, strict=False):
        times = dict(zip(*record.series("rl", f"time/{stage}"), strict=True))
        if times:
            base = _bars(axes, steps, [times.get(step, 0.0) for step in steps], base, stage, colour)
    rest = [max(0.0, total - spent) for total, spent in zip(totals, base, strict=False)]
    if any(rest):
        _bars(axes, steps, rest, base, "other", theme.colours[-1])


def _bars(
    axes: Axes, steps: list[int], heights: list[float], base: list[float], label: str, colour: str
) -> list[float]:
    axes.bar(steps, heights, bottom=base, width=0.9 if len(steps) < 60 else 1.0, color=colour, label=label, linewidth=0)
    return [low + height for low, height in zip(base, heights, strict=True)]


def smoothing(line: Line, steps: int) -> int:
    """The window of the running mean over the noise of many steps, odd so that it is centred; 1 for none."""
    return max(3, steps // 20 | 1) if steps >= _SMOOTH_FROM and line.stage != "eval" else 1


def mean_of(runs: Sequence[tuple[list[int], list[float]]]) -> tuple[list[int], list[float]]:
    """The mean over runs at the steps that all of them have: the set of runs must not change along the line."""
    tables = [dict(zip(*run, strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, tables)))
    return steps, [sum(table[step] for table in tables) / len(tables) for step in steps]


def running_mean(values: list[float], window: int) -> list[float]:
    half = window // 2
    spans = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _style(axes: Axes, figure: Figure, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor(theme.face)
    axes.set_xlabel("SFT step" if figure.name == "sft_loss" else "step", color=theme.muted, fontsize=9)
    axes.set_ylabel(figure.unit, color=theme.muted, fontsize=9)
    axes.tick_params(colors=theme.muted, labelsize=9, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10], min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
    if figure.share:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))
    axes.yaxis.get_offset_text().set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.grid)
    axes.margins(x=0.02)


def _limits(axes: Axes, figure: Figure) -> None:
    left, right = axes.get_xlim()
    if right - left < 1:  # a single step: no fractions of it on the axis
        axes.set_xlim(round(left) - 1, round(right) + 1)
    low, high = axes.get_ylim()
    if figure.share:
        # A rate near zero deserves its own scale, but a share is never outside [0, 1].
        axes.set_ylim(max(0.0, low) if low > 0.05 else 0.0, min(1.02, max(high, 0.01)))
    elif low > 0 and figure.name in ("response_length", "groups", "time"):
        axes.set_ylim(0, high)
