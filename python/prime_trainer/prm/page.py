"""Scored responses as one self-contained HTML page: steps and tokens coloured by reward, the cumulative curve."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..run.atomic_files import replace_file
from ..run.jsonl import jsonl_rows
from .items import PROMPTS, outcome

WIDTH, HEIGHT, MARGIN = 320, 150, 8


def write_page(scores: Path, page: Path, limit: int) -> Path:
    """Writes the first `limit` scored responses of a file that `score` wrote as `page`."""
    rows = itertools.islice((row for _, row in jsonl_rows(scores) if row.get("rewards")), limit)
    replace_file(page, render(rows, title=scores.parent.name))
    return page


def render(rows: Iterable[dict[str, Any]], title: str) -> str:
    """The page. All that is filled in is escaped: prompts and responses are untrusted text."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("prime_trainer.prm").joinpath("steps.html.j2").read_text(encoding="utf-8")
    responses = [_response(row) for row in rows]
    counts = {kind: sum(r["outcome"] == kind for r in responses) for kind in ("correct", "incorrect", "unlabelled")}
    of = " or ".join(dict.fromkeys(r["value"] for r in responses)) or "sum"
    return environment.from_string(source).render(
        title=title, responses=responses, counts=counts, of=of, width=WIDTH, height=HEIGHT
    )


def _response(row: dict[str, Any]) -> dict[str, Any]:
    rewards, label = row["rewards"], outcome(row)
    tokens = rewards.get("token_rewards") or []
    # Steps and tokens have separate scales: a step is a sum or a mean of many tokens.
    step_scale = max(map(abs, rewards["single"]), default=0.0)
    token_scale = max(map(abs, tokens), default=0.0)
    return {
        "outcome": "unlabelled" if label is None else "correct" if label > 0.5 else "incorrect",
        "prompt": _prompt(row),
        "value": rewards.get("value", "sum"),
        "total": f"{rewards['cumulative'][-1]:+.4g}",
        "lowest": f"{min(rewards['single']):+.4g}",
        "reward_model": row.get("reward_model", ""),
        "step_scale": f"{step_scale:.3g}",
        "token_scale": f"{token_scale:.3g}",
        "steps": list(_steps(rewards, step_scale, token_scale)),
        "curve": _curve(rewards["cumulative"]),
    }


def _prompt(row: dict[str, Any]) -> str:
    prompt = next((row[name] for name in PROMPTS if row.get(name)), "")
    return prompt if isinstance(prompt, str) else "\n\n".join(m["content"] for m in prompt if m["role"] != "system")


def _steps(rewards: dict[str, Any], step_scale: float, token_scale: float) -> Iterator[dict[str, Any]]:
    cu_steps, tokens = rewards["cu_steps"], rewards.get("tokens")
    for k, text in enumerate(rewards["steps"]):
        span = range(cu_steps[k], cu_steps[k + 1])
        single, cumulative = rewards["single"][k], rewards["cumulative"][k]
        yield {
            "number": k + 1,
            "colour": colour(single, step_scale),
            "title": f"step {k + 1}: single {single:+.4g}, cumulative {cumulative:+.4g}",
            "single": f"{single:+.2g}",
            "tokens": [
                {
                    "text": tokens[t],
                    "colour": colour(rewards["token_rewards"][t], token_scale),
                    "title": f"{rewards['token_rewards'][t]:+.4g}",
                }
                for t in span
            ]
            if tokens
            else [{"text": text, "colour": colour(0.0, 1.0), "title": ""}],
        }


def colour(value: float, scale: float) -> str:
    """`rgb(..)` from white at 0 to full blue at +scale and full red at -scale.

    The share is the square root of |value| / scale: small values stay visible beside the largest.
    """
    share = (min(1.0, abs(value) / scale)) ** 0.5 if scale else 0.0
    end = (70, 130, 235) if value > 0 else (235, 85, 75)
    return "rgb({}, {}, {})".format(*(round(255 + share * (channel - 255)) for channel in end))


def _curve(cumulative: list[float]) -> dict[str, Any]:
    """The curve from 0 at the start through Q_k at the end of each step, in the coordinates of the drawing."""
    values = [0.0, *cumulative]
    low, high = min(values), max(values)
    room = (high - low) or 1.0

    def place(k: int, value: float) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * k / (len(values) - 1)
        y = MARGIN + (HEIGHT - 2 * MARGIN) * (high - value) / room
        return round(x, 1), round(y, 1)

    places = [place(k, value) for k, value in enumerate(values)]
    dots = [
        {"x": x, "y": y, "title": f"step {k + 1}: {value:+.4g}"}
        for k, ((x, y), value) in enumerate(zip(places[1:], cumulative, strict=True))
    ]
    return {
        "line": " ".join(f"{x},{y}" for x, y in places),
        "zero": place(0, 0.0)[1],
        "dots": dots,
        "high": f"{high:+.3g}",
        "low": f"{low:+.3g}",
    }
