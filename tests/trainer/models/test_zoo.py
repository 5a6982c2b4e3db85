"""Every causal-LM class of the installed transformers: exact, or refused with a reason, never silently wrong."""

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[train]'")

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("zoo", ROOT / "bench" / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(zoo)
CLASSES = zoo.names()


@pytest.fixture(autouse=True)
def kept_seed():
    """Tiny models are of one seed, whatever the tests' own."""
    zoo.torch.manual_seed(0)


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_class_is_exact_or_refused(model_type):
    found = zoo.examine(model_type, CLASSES[model_type])
    assert not found.wrong, f"{found.name} ({found.status}): {found.wrong}"
    assert found.status.startswith("exact") or found.note, f"{found.name} is {found.status} without a reason"
    if model_type in zoo.MUST_BE_EXACT:
        assert found.status.startswith("exact"), f"{found.name}: {found.note}"
        assert found.sampler.startswith("yes"), f"{found.name}: {found.sampler}"


def test_most_classes_are_exact():
    """A change of the builder must not turn the table into refusals and classes that are not built."""
    import re

    page = (ROOT / "docs" / "models.md").read_text()
    counts = {
        status: int(count) for count, status in re.findall(r"(\d+) (exact, one response a row|exact|refused)", page)
    }
    assert counts["exact"] >= 90 and counts["exact, one response a row"] >= 25
    for name in (CLASSES[model_type] for model_type in zoo.MUST_BE_EXACT):
        assert re.search(rf"^\| {name} \| exact", page, re.M), name
