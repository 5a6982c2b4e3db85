"""The gallery: every page runs, here or where its trainer is installed, and every link leads somewhere."""

import re
from pathlib import Path

import pytest
from helpers.support import run_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HERE = ("pytorch", "huggingface", "prm")
# tests/integrations/installed runs these, in an environment that has the trainers.
ELSEWHERE = ("trl", "verl", "openrlhf")
# Launch lines and tables: tests/trainer/scale has what they speak of.
NO_PYTHON = ("scale",)


@pytest.mark.parametrize("name", HERE)
def test_page_runs(name, tmp_path, capsys):
    given = {}
    if name != "pytorch":
        pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[train]'")
    if name == "prm":
        from helpers import tiny

        given["REFERENCE"] = tiny.write_model(tmp_path / "reference")
        given["PRM"] = tiny.write_model(tmp_path / "prm", tied=False)
    names = run_page(DOCS / f"{name}.md", **given)
    if name == "prm":
        single = names["scored"].single
        said = (
            f"the weakest is step {single.index(min(single)) + 1}; the solution scores {min(single):+.4f} at its worst"
        )
        assert len(single) == 3 and said in capsys.readouterr().out


def test_no_page_is_left_out():
    assert {page.stem for page in DOCS.glob("*.md")} == {"README", *HERE, *ELSEWHERE, *NO_PYTHON}
    for name in ELSEWHERE:
        test = (ROOT / "tests" / "integrations" / "installed" / f"test_{name}.py").read_text()
        assert f'"docs" / "{name}.md"' in test


@pytest.mark.parametrize("page", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
