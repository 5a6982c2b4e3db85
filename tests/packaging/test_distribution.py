"""Another distribution with a package `prime_kernels` in the environment: reports and failed imports name it."""

import json
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import prime_kernels
from prime_kernels import _distribution

ROOT = Path(__file__).resolve().parents[2]
OTHER = """
def is_available(): return False
def load(): raise RuntimeError("not ours")
def status(): return {}
"""
# torch comes from the outer environment, by hand so that no .pth file of it runs (an editable install has one).
START = f"import sys, runpy; sys.path.append({sysconfig.get_path('platlib')!r}); sys.argv[:] = ['prime']; "
EVERYTHING = """
import contextlib, io, json
from prime_kernels import _native
said = {"native": _native.unavailable_reason()}
for name in ("report", "train"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        if name == "report":
            try:
                status = runpy.run_module("prime_kernels", run_name="__main__")
            except SystemExit as end:
                status = end.code
        else:
            from prime_trainer.cli import main
            status = main(["sft", "--model.path", "/nowhere"])
    said[name] = status, out.getvalue(), err.getvalue()
print(json.dumps(said))
"""


def make_wheel(folder, name, files):
    """A wheel of pure Python, small enough to be written by hand."""
    stem = f"{name.replace('-', '_')}-0.1.0"
    info = {
        "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n",
        "WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files = files | {f"{stem}.dist-info/{part}": text for part, text in info.items()}
    files[f"{stem}.dist-info/RECORD"] = "".join(f"{path},,\n" for path in (*files, f"{stem}.dist-info/RECORD"))
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for place, text in files.items():
            archive.writestr(place, text)
    return path


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    ours = {}
    for root, package in ((ROOT, "prime_kernels"), (ROOT / "python", "prime_trainer")):
        for path in (root / package).rglob("*.py"):
            ours[str(path.relative_to(root))] = path.read_text(encoding="utf-8")
    return {
        "ours": make_wheel(folder, _distribution.NAME, ours),
        "other": make_wheel(folder, "prime-kernels", {"prime_kernels/__init__.py": OTHER}),
    }


@pytest.fixture(scope="module", params=["ours", "ours other", "other ours"])
def environment(request, wheels, tmp_path_factory):
    """What was installed, in this order, and the interpreter of that environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    for name in request.param.split():
        command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", python, "install"]
        subprocess.run([*command, "--no-deps", "--no-index", "--no-compile", wheels[name]], check=True)
    return request.param, python


@pytest.fixture(scope="module")
def said(environment):
    done = subprocess.run([environment[1], "-c", f"{START}\n{EVERYTHING}"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_report_names_the_conflict(environment, said):
    status, out, err = said["report"]
    if environment[0] == "ours":
        assert status == 0 and "conflict" not in out and out.startswith(f"prime_kernels {prime_kernels.__version__}")
    elif environment[0] == "other ours":
        assert status == 0 and "\nconflict: prime-kernels and prime-process-rewards bring the same package" in out
    else:
        assert status == 1 and "is not that of prime-process-rewards: prime-kernels and" in err and not out
        assert "pip uninstall -y prime-kernels prime-process-rewards, then pip install prime-process-rewards" in err


def test_failed_imports_name_the_conflict(environment, said):
    """That of the extension, which no wheel here has, and that of names which the other package lacks."""
    assert ("prime-kernels and prime-process-rewards" in said["native"]) == ("other" in environment[0])
    assert "prime_kernels._C cannot be imported" in said["native"]
    status, _, err = said["train"]
    assert "Traceback" not in err and err.count("error: ") == 1
    if environment[0] == "ours other":
        assert status == 1 and "prime-kernels and prime-process-rewards bring the same package" in err
    else:
        assert status == 2 and "/nowhere" in err


def test_names_are_compared_as_installers_do():
    assert _distribution.conflict([]) is None
    assert _distribution.conflict(["Prime_Process.Rewards", "prime-process-rewards"]) is None
    assert "prime-kernels and" in _distribution.conflict(["prime_process_rewards", "Prime_Kernels"])


def test_no_text_offers_the_other_distribution():
    """What is installed by name is ours."""
    files = [path for name in ("prime_kernels", "python", "docs") for path in (ROOT / name).rglob("*.*")]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "setup.py")]
    wrong = re.compile(r"(?<!un)install (-\S+ )*'?prime-kernels\b")
    for path in files:
        if path.suffix in (".py", ".md", ".toml", "") or path.name == "Makefile":
            assert not wrong.search(path.read_text(encoding="utf-8")), path
