"""The process that calls a reward function: `python -m prime_trainer.verify.rewards.worker module:function`.

A request is a line of JSON with `texts` and `problems`, a reply one with `scores`, with `failure` where the function
raised, or with `wrong` where it returned something else than a score in [0, 1] for each text.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


def main(name: str) -> None:
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    # What the function reads or prints must not be mistaken for a message.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    module, _, function = name.partition(":")
    try:
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:
        reply({"error": _told(error)})
        return
    if not callable(reward):
        reply({"error": f"TypeError: {name} is no function, got {reward!r:.100}"})
        return
    reply({"ready": True})
    for line in requests:
        request = json.loads(line)
        reply(call(reward, request["texts"], request["problems"]))


def call(reward: Callable[..., Any], texts: Sequence[str], problems: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is replied to one request."""
    try:
        scores = reward(list(texts), list(problems))
    except Exception as error:
        return {"failure": _told(error)}
    try:
        found = [float(score) for score in scores]
    except Exception:
        return {"wrong": f"expected a list of numbers, got {scores!r:.100}"}
    if len(found) != len(texts):
        return {"wrong": f"expected as many scores as texts, {len(texts)}, got {len(found)}"}
    bad = [score for score in found if not 0.0 <= score <= 1.0]  # NaN too
    return {"wrong": f"expected scores from 0 to 1, got {bad[0]!r}"} if bad else {"scores": found}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


if __name__ == "__main__":
    main(sys.argv[1])
