"""Runs as one self-contained HTML page, with the figures as PNG files and the summary as Markdown beside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..run.atomic_files import replace_file
from ..run.output_lock import output_lock
from .arm_plots import draw_arms
from .comparison import MEASURES, Comparison, arm_rows, arms_of, difference_rows, reach_rows, shown
from .markdown import escaped, table
from .plots import DARK, FIGURES, LIGHT, Figure, Theme, draw, has_data
from .run_record import Record, read_record
from .statistics import wilson

_HEADERS = ("run", "model", "task", "method", "steps", "accuracy before", "accuracy after", "change", "training time")
_SETTINGS = ("model", "task", "method", "steps")
_FACTS = ("accuracy before", "accuracy after", "change", "steps", "training time")


def write_report(run_dir: Path, others: Sequence[Path] = ()) -> Path:
    """Writes `run_dir/report/index.html`, `summary.md` and the PNGs; returns the path of the page.

    `others` are further runs. Where they differ in their seed alone, the figures show each as a thin line and the mean
    as a thick one, and the table has a row for each. Otherwise runs of equal settings are an arm: the figures have a
    line and a band for each, the tables its means, paired differences and the time to the others' reward. Raises
    FileNotFoundError or ValueError for a directory without metrics.
    """
    records = [read_record(path) for path in (run_dir, *others)]
    out = run_dir / "report"
    with output_lock(out, key="report"):
        return _write(records, out)


def _write(records: Sequence[Record], out: Path) -> Path:
    found = arms_of(records)
    many = len(found.arms) > 1
    rows = [summary_row(record) for record in records]
    if many:
        of = {record.path: arm.name for arm in found.arms for record in arm.records}
        rows = [{"arm": of[record.path], **row} for record, row in zip(records, rows, strict=True)]
    elif len(records) > 1:
        rows.append(_mean_row(records))
    shared, rows = _settings_once(rows)
    tables = [Table("Runs" if len(records) > 1 else "Summary", rows, _note(len(records), many))]
    if many:
        tables = [*_comparison(found), *tables]
    replace_file(out / "summary.md", markdown_page(shared, tables))
    figures = []
    for figure in FIGURES:
        if not has_data(figure, records):
            continue

        def picture(theme: Theme, *, titled: bool = False, figure: Figure = figure) -> bytes:
            return (
                draw_arms(figure, found, theme, titled=titled) if many else draw(figure, records, theme, titled=titled)
            )

        replace_file(out / f"{figure.name}.png", picture(LIGHT, titled=True))
        figures.append({"spec": figure, "light": _inline(picture(LIGHT)), "dark": _inline(picture(DARK))})
    page = out / "index.html"
    replace_file(page, _render(records, found, shared, tables, figures))
    return page


@dataclass(frozen=True)
class Table:
    """A table of the page; all rows have the same keys."""

    title: str
    rows: list[dict[str, str]]
    note: str


def _comparison(found: Comparison) -> list[Table]:
    steps, window = found.horizon, found.window
    until = f"Up to step {steps}, which all runs have; final is the mean of the last {_plural(window, 'step')}."
    tables = [
        Table("Arms", arm_rows(found), f"{until} In brackets the 95 % interval of the mean over seeds (Student's t)."),
        Table(
            "Paired differences", difference_rows(found),
            f"Of runs with the same seed, from {found.arms[0].name}, in percentage points where the figure is a "
            "percentage; in brackets the 95 % interval of their mean (Student's t).",
        ),
        Table(
            "Time to the other's reward", reach_rows(found),
            f"The first step at which the mean reward of the last {_plural(window, 'step')} is at least the other "
            "arm's final reward, and the training time until then; in brackets their share of the other's.",
        ),
        Table(
            "Settings of the arms",
            [{"arm": arm.name} | {key: shown(value) for key, value in arm.settings.items()} for arm in found.arms],
            "All other settings are the same."
            + (f" Not compared, as only some runs state them: {', '.join(found.unstated)}." if found.unstated else ""),
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{count} {word}s"


def _note(runs: int, many: bool) -> str:
    note = "Accuracy is greedy, on held-out problems, with the 95 % Wilson interval in brackets."
    if many:
        return (
            f"{note} In the figures a line is the mean of an arm's runs at the steps that all of them have, and the "
            "band goes from their lowest to their highest."
        )
    if runs > 1:
        return (
            f"{note} In the figures a thin line is a run and the thick line their mean, over the steps that all runs "
            "have; the time per step is that of the first run."
        )
    return note


def _settings_once(rows: list[dict[str, str]]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """(settings that all runs share, rows without them); a single run keeps its own."""
    if len(rows) == 1:
        return {}, rows
    shared = {}
    for key in _SETTINGS:
        values = {row[key] for row in rows if row[key]}
        if len(values) == 1:
            shared[key] = values.pop()
    return shared, [{key: text for key, text in row.items() if key not in shared} for row in rows]


def summary_row(record: Record) -> dict[str, str]:
    """Returns the run's row of the summary table; a dash stands for what the run does not say."""
    row = dict.fromkeys(_HEADERS, "–")
    row["run"] = record.label
    if (model := record.setting("model", "path")) is not None:
        row["model"] = str(model)
    if (task := _task(record)) is not None:
        row["task"] = task
    if (process := record.setting("algorithm", "process_coef")) is not None:
        estimator = str(record.setting("algorithm", "estimator") or "rloo").upper()
        row["method"] = f"outcome-only {estimator}" if process == 0 else "PRIME"
        if process > 0 and estimator != "RLOO":
            row["method"] = f"PRIME with {estimator}"
    trained = sorted(record.metrics.get("rl") or record.metrics.get("sft") or {})
    row["steps"] = str(trained[-1] if trained else 0)
    steps, accuracy = record.series("eval", "greedy")
    if steps:
        row["accuracy before"] = _accuracy(record, steps[0], accuracy[0])
    if len(steps) > 1:
        row["accuracy after"] = _accuracy(record, steps[-1], accuracy[-1])
        row["change"] = f"{100 * (accuracy[-1] - accuracy[0]):+.1f} points"
    if seconds := sum(record.series("rl", "time/total")[1]):
        row["training time"] = duration(seconds)
    return row


def _mean_row(records: Sequence[Record]) -> dict[str, str]:
    row = dict.fromkeys(_HEADERS, "")
    runs = [series for record in records if len(series := record.series("eval", "greedy")[1]) > 1]
    row["run"] = f"mean of {len(runs)} runs"
    if runs:
        before, after = (sum(run[end] for run in runs) / len(runs) for end in (0, -1))
        changes = [run[-1] - run[0] for run in runs]
        mean = sum(changes) / len(changes)
        row["accuracy before"], row["accuracy after"] = f"{100 * before:.1f} %", f"{100 * after:.1f} %"
        row["change"] = f"{100 * mean:+.1f} points"
        if len(runs) > 1:
            deviation = math.sqrt(sum((change - mean) ** 2 for change in changes) / (len(runs) - 1))
            row["change"] += f" (standard deviation {100 * deviation:.1f})"
    return row


def _accuracy(record: Record, step: int, share: float) -> str:
    count = record.metrics["eval"][step].get("n")
    if not count:
        return f"{100 * share:.1f} %"
    low, high = wilson(share, int(count))
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _task(record: Record) -> str | None:
    task = record.setting("task")
    if not isinstance(task, dict):
        return None
    if task.get("kind") != "reasoning_gym":
        return Path(str(task.get("path"))).name
    params = ", ".join(f"{key}={value}" for key, value in (task.get("params") or {}).items())
    return f"{task.get('name')} ({params})" if params else str(task.get("name"))


def duration(seconds: float) -> str:
    """`3700.0` -> `1 h 2 min`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def markdown_page(shared: Mapping[str, str], tables: Sequence[Table]) -> str:
    """Returns the tables as Markdown, the settings that all runs share above them."""
    parts = [", ".join(f"{key}: {escaped(text)}" for key, text in shared.items()) + ".\n"] if shared else []
    for each in tables:
        title = f"{each.title}\n\n" if len(tables) > 1 else ""
        parts.append(f"{title}{table(each.rows)}\n{escaped(each.note)}\n")
    return "\n".join(parts)


def _render(
    records: Sequence[Record],
    found: Comparison,
    shared: Mapping[str, str],
    tables: Sequence[Table],
    figures: list[dict[str, Any]],
) -> str:
    from jinja2 import Environment, StrictUndefined

    # Escaping is on for all that is filled in: the responses are untrusted text.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("prime_trainer.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    record, own = records[0], tables[-1].rows
    many = len(found.arms) > 1
    if many:
        arms = tables[0].rows
        told = next((m.title for m in MEASURES if m.title in arms[0]), "runs")
        facts = [_fact(f"{arm['arm']}: {told}", arm[told]) for arm in arms]
        headline = f"{len(records)} runs in {len(found.arms)} arms"
    else:
        # Of several runs, results are their mean; settings are the same for all.
        first = {**shared, **own[0]} | {key: text for key, text in own[-1].items() if text}
        facts = [_fact(key, first[key]) for key in _FACTS]
        headline = f"{first['method']} on {first['task']}" + (f", {first['run']}" if len(records) > 1 else "")
    return environment.from_string(source).render(
        title=record.path.name,
        headline=headline,
        shared=dict(shared),
        facts=facts,
        tables=tables,
        figures=figures,
        samples=[_sample(sample) for sample in _choose(record.samples)],
    )


def _fact(key: str, text: str) -> dict[str, str]:
    value, _, interval = text.partition(" [")
    return {"key": key, "value": value, "interval": interval.rstrip("]")}


def _choose(samples: Sequence[dict[str, Any]], early: int = 2, late: int = 4) -> list[dict[str, Any]]:
    """The last step's first responses and, to compare with, the first step's."""
    if not samples:
        return []
    first, last = samples[0]["step"], samples[-1]["step"]
    chosen = [sample for sample in samples if sample["step"] == last][:late]
    return chosen if first == last else chosen + [s for s in samples if s["step"] == first][:early]


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    dense = sample.get("process_rewards") is not None
    values = sample["process_rewards"] if dense else sample.get("advantages") or []
    values = [*values, *[None] * (len(sample["tokens"]) - len(values))]
    scale = max((abs(value) for value in values if value is not None), default=0.0)
    return {
        "step": sample["step"],
        "prompt": sample["prompt"],
        "reference": sample["reference"],
        "outcome": sample["outcome"],
        "quantity": "process reward" if dense else "advantage",
        "scale": f"{scale:.3g}",
        "tokens": [_token(*pair, scale) for pair in zip(sample["tokens"], values, strict=False)],
    }


def _token(text: str, value: float | None, scale: float) -> dict[str, Any]:
    if not value:
        return {"text": text, "sign": "", "strength": 0, "value": "no value" if value is None else "+0"}
    # The square root keeps small values visible beside the largest.
    strength = math.sqrt(abs(value) / scale)
    return {
        "text": text,
        "sign": "pos" if value > 0 else "neg",
        "strength": round(strength, 2),
        "value": f"{value:+.4g}",
    }


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
