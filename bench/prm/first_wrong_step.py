"""Finds the first wrong step of a worked sum, and whether a PRM's lowest step reward falls on it.

A step of a worked solution is `a + b = c` with the running total for a (a term of the sum in the first step), a term
that is still open for b, and their sum for c; the last is \\boxed{the total}, with no term left. The first step that is
not so is the first wrong one. A response that is written in any other way has none that is known.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

_SUM = re.compile(r"\d+(?: \+ \d+)+")
_STEP = re.compile(r"(\d+) \+ (\d+) = (\d+)")
_BOX = re.compile(r"\\boxed\{(\d+)\}")


def first_wrong_step(question: str, steps: Sequence[str]) -> int | None:
    """The index of the first wrong step; None where there is none or it cannot be told."""
    found = _SUM.search(question)
    if found is None or _STEP.fullmatch(steps[0].strip()) is None:
        return None
    open_terms, total = Counter(map(int, found.group().split(" + "))), None
    for k, text in enumerate(steps):
        step, box = _STEP.fullmatch(text.strip()), _BOX.fullmatch(text.strip())
        if step is not None:
            a, b, c = map(int, step.groups())
            if total is None:
                if not open_terms[a]:
                    return k
                open_terms[a] -= 1
            elif a != total:
                return k
            if not open_terms[b] or a + b != c:
                return k
            open_terms[b] -= 1
            total = c
        elif box is not None:
            return k if int(box.group(1)) != total or open_terms.total() else None
        else:
            return None
    return None  # cut off before the answer


def locate(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Over the wrong responses with a known first wrong step: how often the lowest single reward is on it, how often a
    step drawn at random would be, and how often the best fixed place would be (0, 1, .. from the first step or
    -1, -2, .. from the last: -2 is the second to last)."""
    hits, chances, places = [], [], Counter()
    for row in rows:
        if row["label"] > 0.5:
            continue
        rewards = row["rewards"]
        wrong = first_wrong_step(row["prompt"][-1]["content"], rewards["steps"])
        if wrong is None or len(rewards["steps"]) < 2:
            continue
        single = rewards["single"]
        hits.append(min(range(len(single)), key=single.__getitem__) == wrong)
        chances.append(1 / len(single))
        places[wrong] += 1
        places[wrong - len(single)] += 1
    count = len(hits)
    place, most = places.most_common(1)[0]
    return {
        "responses": count,
        "lowest_on_first_wrong": sum(hits) / count,
        "chance": sum(chances) / count,
        "best_fixed_place": place,
        "best_fixed_place_share": most / count,
    }
