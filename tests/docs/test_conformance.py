"""Each row of the conformance page names tests that exist, and has a figure or says that there is none yet."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "conformance.md"
CLAIMS = ("gradient", "graph", "error", "bits", "never falls back", "memory")


@pytest.fixture(scope="module")
def script():
    pytest.importorskip("transformers", reason="the trainer's packages are not installed: pip install '.[train]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
        return runpy.run_path(str(ROOT / "bench" / "conformance.py"))


@pytest.fixture(scope="module")
def rows(script):
    """[what, tests, CPU, GPU] of each row of the page."""
    table = PAGE.read_text(encoding="utf-8").split(script["MARKS"][0])[1].split(script["MARKS"][1])[0]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if "|" in line]
    return [line for line in lines[1:] if not line[0].startswith("---")]


def functions(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_rows_are_those_of_the_script(script, rows):
    assert [row[0] for row in rows] == [row.what for row in script["ROWS"]]
    for claim in CLAIMS:
        assert any(claim in row[0] for row in rows), claim


def test_tests_exist(script, rows):
    for row, made in zip(rows, script["ROWS"], strict=True):
        named = re.findall(r"`([^`]+)`", row[1])
        assert named == list(made.tests) and named
        for name in named:
            path, function = name.split("::")
            assert function in functions(ROOT / path), name


def test_every_figure_is_measured_or_says_that_it_is_not(script, rows):
    for what, _, cpu, gpu in rows:
        assert re.search(r"\d", cpu), what
        assert gpu == script["UNMEASURED"] or re.search(r"\d", gpu), what


def test_figures_of_a_small_head(script, tmp_path, monkeypatch):
    """The script writes the table between the marks and keeps the column of the other device."""
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text(encoding="utf-8").replace("not yet measured", "7.0 of another device", 1))
    sizes = ["--tokens", "40", "--width", "8", "--vocabulary", "60"]
    monkeypatch.setattr(sys, "argv", ["conformance.py", str(page), *sizes])
    script["main"]()
    text = page.read_text(encoding="utf-8")
    assert text.count("7.0 of another device") == 1 and "40 tokens, width 8, vocabulary 60." in text
    before, after = (part.split(script["MARKS"][0])[0] for part in (PAGE.read_text(encoding="utf-8"), text))
    assert before == after and text.split(script["MARKS"][1])[1] == PAGE.read_text("utf-8").split(script["MARKS"][1])[1]
    found = script["cells"](text)
    assert found["log-ratio of equal heads"][0] == "0.0 at most"
    errors = [float(cells[0].split()[0]) for what, cells in found.items() if what.startswith(("gradient", "error"))]
    assert len(errors) == 6 and all(0 <= error < 2e-2 for error in errors)
