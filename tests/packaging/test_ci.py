"""The files of the public CI and of pre-commit agree with what `.ci/run` and `make lint` do."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def pinned(package):
    return re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


def test_pre_commit_has_the_pinned_tools():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"ruff-pre-commit\n    rev: v(\S+)", text) == [pinned("ruff")]
    assert re.findall(r"mypy==(\S+)", text) == [pinned("mypy")]
    assert ".venv/bin/python -m mypy" in text and "ruff-check" in text and "ruff-format" in text


def test_both_files_are_yaml():
    yaml = pytest.importorskip("yaml", reason="pyyaml is not installed")
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook["id"] for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == ["ruff-check", "ruff-format", "mypy", "commit-subject"]
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for step in workflow["jobs"]["ci"]["steps"] if "run" in step]
    assert commands == ["sudo make debian", ".ci/run"]
    assert workflow["permissions"] == {"contents": "read"}


def test_the_tested_python_is_the_oldest_supported():
    (version,) = re.findall(r'python-version: "([\d.]+)"', (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert f'requires-python = ">={version}"' in (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def fault():
    spec = importlib.util.spec_from_file_location("commit_subject", ROOT / ".github" / "commit_subject.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.fault


@pytest.mark.parametrize(
    "message",
    ["docs: list what was not measured", "run/metrics: append rows\n\nWhy, at any length.", "Merge branch 'docs'"],
)
def test_good_subjects(fault, message):
    assert fault(message) is None


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("docs: " + "x" * 67, "73 characters"),
        ("What was not measured is said", "scope: imperative"),
        ("docs: List what was not measured", "scope: imperative"),
        ("docs: list what was not measured.", "scope: imperative"),
    ],
)
def test_bad_subjects(fault, message, said):
    assert said in fault(message)
