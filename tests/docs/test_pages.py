"""The pages: their Python runs, their TOML loads, their commands exist, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
from helpers.support import code_blocks, run_page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HERE = ("pytorch", "huggingface", "kernels", "prm", "rewards")
# tests/integrations/installed runs these, in an environment that has the trainers.
ELSEWHERE = ("trl", "verl", "openrlhf", "skyrl")
# Commands, settings and tables.
NO_PYTHON = (
    "adapters", "conformance", "docker", "drop_ins", "evaluation", "gpu_targets", "how_prime_works", "models",
    "reference", "rollouts", "scale", "training", "troubleshooting", "verifiers", "wheels",
)  # fmt: skip
MADE = r"api/.*\.html|configuration\.md"
"""Made when the site is built; tests/docs/test_site.py looks for them there."""
PAGES = [*sorted(DOCS.glob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))]
PAGES += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


@pytest.mark.parametrize("name", HERE)
def test_page_runs(name, tmp_path, capsys):
    given = {}
    if name in ("huggingface", "prm"):
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


def named(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8")):
        if not re.fullmatch(MADE, target):
            assert (page.parent / target).exists(), target


def test_python_outside_of_tests_is_in_no_page():
    for name in NO_PYTHON:
        assert not code_blocks((DOCS / f"{name}.md").read_text(encoding="utf-8"), "python"), name


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=named)
def test_settings_load(page, tmp_path, monkeypatch):
    load = pytest.importorskip("prime_trainer.config.load", reason="pydantic-settings is not installed").load
    for number, block in enumerate(code_blocks(page.read_text(encoding="utf-8"), "toml")):
        (tmp_path / f"{number}.toml").write_text(block)
        load(tmp_path / f"{number}.toml")


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), ROOT / "README.md"], ids=named)
def test_commands_exist(page):
    """The names of commands and keys; tests/packaging/test_readme.py runs whole lines."""
    cli = pytest.importorskip("prime_trainer.cli")
    keys = set(pytest.importorskip("prime_trainer.config.load", reason="pydantic-settings is not installed").keys())
    keys |= {"gpus", "memory", "prompt-tokens", "help", "schema"}  # of plan, of init, and of all
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    plain = "".join(code_blocks(re.sub(r"^```\w+\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), ""))
    for line in re.findall(r"(?:^|-m )prime[-_]trainer(?:\.cli)? (.*)$", plain, re.MULTILINE):
        words = shlex.split(line, comments=True)
        if words[0] == "COMMAND":
            continue
        assert words[0] in cli.COMMANDS, line
        for word in words:
            assert not word.startswith("--") or word[2:] in keys, line
