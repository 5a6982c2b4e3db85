"""The table of the PRM's run says what its figures mean."""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "bench" / "prm"


def test_places_are_explained(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    results = __import__("results")
    monkeypatch.delitem(sys.modules, "results")
    lines = results.figures(
        {seed: {"worked_pairs": 1 / 3, "best_fixed_place": place} for seed, place in (("0", -2), ("1", 3))}
    )
    assert lines == [
        "| figure | seed 0 | seed 1 |",
        "| --- | --- | --- |",
        "| worked pairs | 0.3333 | 0.3333 |",
        "| best fixed place (0 is the first step, -1 the last, -2 the second to last) | -2 | 3 |",
    ]
