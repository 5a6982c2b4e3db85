"""The site builds strictly, every link in it leads somewhere, and it needs nothing from elsewhere."""

import importlib
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

import prime_kernels
from prime_trainer.config.load import keys

ROOT = Path(__file__).resolve().parents[2]
MODULES = [
    "prime_kernels",
    *(f"prime_kernels.integrations{name}" for name in ("", ".trl", ".verl", ".openrlhf", ".skyrl")),
]
MODULES += ["prime_trainer.prm"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "latex2mathml", "pdoc"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'python'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}


def test_every_page_is_there(site):
    wanted = {f"{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} - {"README.html"}
    assert wanted | {"index.html", "configuration.html"} <= {path.name for path in site.glob("*.html")}
    assert not (site / "site_hooks.py").exists()


def test_links_lead_somewhere(site, pages):
    """Of files and of places in them, the API reference included."""
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    lost, count = [], 0
    for path, text in pages.items():
        # 404.html is served under any address, so its links are those of the site's root.
        for link in re.findall(r'(?:href|src)="([^"]*)"', text) if path.name != "404.html" else []:
            target, _, anchor = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:|\$\{", target):  # elsewhere, or a template in the reference's search
                continue
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            count += 1
            if not found.is_file() or (anchor and found.suffix == ".html" and anchor not in {*ids[found], "__search"}):
                lost.append(f"{path.relative_to(site)}: {link}")
    assert not lost, lost[:20]
    assert count > 1000


def test_nothing_comes_from_elsewhere(site, pages):
    """Links may lead out; scripts, styles, fonts and pictures are in the site."""
    for path, text in pages.items():
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]*\brel="(?:stylesheet|preload|preconnect|icon)"[^>]*\bhref="([^"]*)"', text)
        loaded += re.findall(r'<link[^>]*\bhref="([^"]*)"[^>]*\brel="(?:stylesheet|preload|preconnect)"', text)
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], path
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\(\s*['\"]?https?:|@import", path.read_text(encoding="utf-8")), path


def test_formulas_are_mathml(site):
    page = (site / "how_prime_works.html").read_text(encoding="utf-8")
    source = (ROOT / "docs" / "how_prime_works.md").read_text(encoding="utf-8")
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block"') == source.count("$$") // 2
    assert "arithmatex" not in page and "$$" not in page and "\\frac" not in page


def test_every_configuration_key_is_there(site):
    page = (site / "configuration.html").read_text(encoding="utf-8")
    leaves = [key for key in keys() if not any(other.startswith(f"{key}.") for other in keys())]
    assert len(leaves) > 100
    for key in leaves:
        assert f"<code>{key}</code>" in page, key


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_there(site, module):
    page = (site / "api" / (module.replace(".", "/") + ".html")).read_text(encoding="utf-8")
    for name in importlib.import_module(module).__all__:
        assert f'id="{name}"' in page, name


def test_docstrings_are_rendered(site):
    page = (site / "api" / "prime_kernels.html").read_text(encoding="utf-8")
    assert "Log-probability of each token, and optionally the entropy" in page
    assert page.count("Returns") >= 12 and "prime_kernels.ops" not in page


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_has_a_docstring(module):
    imported = importlib.import_module(module)
    for name in imported.__all__:
        assert (getattr(imported, name).__doc__ or "").strip(), f"{module}.{name}"


def test_version_is_everywhere_the_same():
    """pyproject.toml, the package, the change log's latest release and the citation."""
    version = prime_kernels.__version__
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert next(heading for heading in headings if heading != "Unreleased") == version
