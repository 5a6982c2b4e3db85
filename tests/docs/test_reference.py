"""The API reference is made from the docstrings, and says something about every public name."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prime_kernels

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["prime_kernels", *(f"prime_kernels.integrations{name}" for name in ("", ".trl", ".verl", ".openrlhf"))]
MODULES += ["prime_trainer.prm"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    pytest.importorskip("pdoc", reason="pdoc is not installed: pip install '.[test]'")
    folder = tmp_path_factory.mktemp("reference")
    makefile = (ROOT / "Makefile").read_text()
    options = re.search(r"^\t@\$\(BIN\)/pdoc (.*) -o build/docs", makefile, re.MULTILINE)[1].split()
    command = [sys.executable, "-m", "pdoc", *options, "-o", str(folder), *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(pages, module):
    page = (pages / (module.replace(".", "/") + ".html")).read_text()
    for name in importlib.import_module(module).__all__:
        assert f'id="{name}"' in page, name


def test_docstrings_are_rendered(pages):
    page = (pages / "prime_kernels.html").read_text()
    assert "Log-probability of each token, and optionally the entropy" in page
    assert page.count("Returns") >= 12 and "prime_kernels.ops" not in page


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    imported = importlib.import_module(module)
    for name in imported.__all__:
        assert (getattr(imported, name).__doc__ or "").strip(), f"{module}.{name}"


def test_version_is_everywhere_the_same():
    """pyproject.toml, the package, the change log and the citation."""
    version = prime_kernels.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
