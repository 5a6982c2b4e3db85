"""make try-wheels: what it skips it says, and the page has what it found. The wheels themselves are not tried here."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("try_wheels.py")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("try_wheels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_base_systems_it_says_so(tmp_path):
    words = ["--dist", tmp_path, "--roots", tmp_path / "roots", "--work", tmp_path / "work"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == f"skipped: {tmp_path / 'roots'} has no root file systems"


def test_a_python_is_the_distributions_own_or_lent(script, tmp_path, monkeypatch):
    root, prefix = tmp_path / "root", tmp_path / "prefix"
    for path in (root / "usr/bin/python3.13", prefix / "bin/python3.12"):
        path.parent.mkdir(parents=True)
        path.touch()
    monkeypatch.setenv("PYTHONS", str(prefix))
    assert script.interpreter(root, "3.13") == ("/usr/bin/python3.13", {})
    assert script.interpreter(root, "3.12") == ("/mnt/python/bin/python3.12", {prefix: "/mnt/python"})
    assert script.interpreter(root, "3.11") is None


def test_what_cannot_be_tried_is_a_row_and_a_failure_is_one_too(script, tmp_path, monkeypatch):
    root, dist = tmp_path / "root", tmp_path / "dist"
    for path in (
        root / "etc/os-release",
        root / "usr/bin/python3.13",
        dist / "p-1-cp312-cp312-manylinux_2_34_x86_64.whl",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('PRETTY_NAME="Some Linux"\n')
    (dist / "p-1-cp313-cp313-manylinux_2_34_x86_64.whl").touch()
    monkeypatch.setenv("PYTHONS", "")
    monkeypatch.setattr(script, "in_root", lambda *_, **__: "glibc 2.99")
    monkeypatch.setattr(script, "torch_for", lambda *_: tmp_path)

    def fails(*_):
        raise subprocess.CalledProcessError(1, "pip", stderr="first\nthe last line\n")

    monkeypatch.setattr(script, "use", fails)
    found = script.rows(dist, [root], tmp_path, ["3.11", "3.12", "3.13"])
    assert [row.python for row in found] == ["3.11", "3.12", "3.13, its own"]
    assert found[0].result == f"not tried: {dist} has no wheel for cp311"
    assert found[1].result == "not tried: no Python 3.12 there or in PYTHONS" and not found[1].failed
    assert found[2] == ("Some Linux", "2.99", "3.13, its own", "manylinux_2_34_x86_64", "FAILED: the last line")
    assert found[2].failed and "| Some Linux | 2.99 | 3.13, its own |" in script.table(found)


def test_the_page_has_what_was_tried(script):
    page = (ROOT / "docs" / "wheels.md").read_text(encoding="utf-8")
    lines = page.split(script.MARKS[0])[1].split(script.MARKS[1])[0].strip().splitlines()[2:]
    rows = [script.Row(*(cell.strip() for cell in line.strip("| ").split(" | "))) for line in lines]
    assert {row.distribution.partition(" (")[0] for row in rows} >= {"Debian GNU/Linux 12", "Debian GNU/Linux 13"}
    assert all(row.result.startswith(("works ", "not tried: ")) for row in rows)
    assert {row.python[:4] for row in rows if row.result.startswith("works ")} == set(script.VERSIONS)


@pytest.mark.parametrize(
    ("libc", "minor", "machine", "chosen"),
    [
        ("manylinux", 34, "x86_64", "cp311-cp311-manylinux_2_34_x86_64"),  # RHEL 9
        ("manylinux", 39, "x86_64", "cp311-cp311-manylinux_2_34_x86_64"),  # Ubuntu 24.04
        ("manylinux", 31, "x86_64", "py3-none-any"),  # Debian 11
        ("manylinux", 39, "aarch64", "py3-none-any"),
        ("musllinux", 2, "x86_64", "py3-none-any"),  # Alpine
    ],
)
def test_pip_takes_the_compiled_wheel_where_glibc_is_new_enough(tmp_path, libc, minor, machine, chosen):
    """By the wheels' names alone, as pip decides it."""
    major = {"manylinux": 2, "musllinux": 1}[libc]
    for tag in ("cp311-cp311-manylinux_2_34_x86_64", "py3-none-any"):
        info = "prime_process_rewards-0.1.0.dist-info"
        with zipfile.ZipFile(tmp_path / f"prime_process_rewards-0.1.0-{tag}.whl", "w") as wheel:
            wheel.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
            wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: prime-process-rewards\nVersion: 0.1.0\n")
            wheel.writestr(f"{info}/RECORD", "")
    # A system takes what was built for an older libc, too.
    platforms = [part for n in range(minor, 0, -1) for part in ("--platform", f"{libc}_{major}_{n}_{machine}")]
    pip = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "download", "--no-deps"]
    pip += ["--no-index", "--find-links", tmp_path, "--only-binary", ":all:", "--python-version", "3.11"]
    command = [*pip, *platforms, "--dest", tmp_path / "got", "prime-process-rewards"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "got").iterdir()] == [f"prime_process_rewards-0.1.0-{chosen}.whl"]
