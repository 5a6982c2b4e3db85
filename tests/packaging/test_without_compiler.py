"""Without a C++ compiler the package installs and computes, and says what is missing and how to build it."""

import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from prime_kernels import _distribution

ROOT = Path(__file__).resolve().parents[2]
USE = f"""
import sys, warnings; sys.path.append({sysconfig.get_path("platlib")!r})
import torch, prime_kernels
assert prime_kernels.__file__.startswith(sys.argv[1]), prime_kernels.__file__
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    logits, ids = torch.randn(3, 5), torch.tensor([0, 4, 2])
    logp = prime_kernels.log_probs(logits, ids)
torch.testing.assert_close(logp, logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0])
reasons = prime_kernels.available_backends()
assert reasons["eager"] is None
print(warned[0].message)
"""


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A compiler that does not work."""
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy: a build writes beside its sources."""
    for tool in ("pybind11", "setuptools", "wheel", "cmake", "ninja"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("sources")
    for name in ("prime_kernels", "python", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info"))
    for name in ("CMakeLists.txt", "LICENSE", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def make_wheel(sources, target, **environment):
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "wheel", "--no-build-isolation"]
    command += ["--no-deps", "--wheel-dir", target, sources]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("choice", ["auto", "OFF"])
def test_installs_and_computes(sources, broken, tmp_path, choice):
    done = make_wheel(sources, tmp_path, PRIME_KERNELS_CPU=choice, CXX=str(broken))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl") == (choice == "OFF")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(tmp_path / "site")
    if choice == "OFF":
        return  # the same files
    use = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{USE}", tmp_path]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(use, capture_output=True, text=True, cwd="/", env={**clean, "CXX": str(broken.parent / "no")})
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "prime_kernels runs CPU tensors on 'eager'" in said and "prime_kernels._C cannot be imported" in said
    assert f"no C++ compiler ({broken.parent / 'no'}) is on the path" in said and "PRIME_KERNELS_CPU=ON pip" in said


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PRIME_KERNELS_CPU": "ON"}, "CXX"),
        ({"PRIME_KERNELS_CUDA": "ON"}, "CXX"),
        ({"PRIME_KERNELS_CPU": "MAYBE"}, "PRIME_KERNELS_CPU must be AUTO, ON or OFF, got 'MAYBE'"),
    ],
    ids=str,
)
def test_what_was_asked_for_is_an_error_without_a_compiler(sources, broken, tmp_path, environment, said):
    done = make_wheel(sources, tmp_path, CXX=str(broken), **environment)
    assert done.returncode != 0 and said in done.stdout + done.stderr and not list(tmp_path.iterdir())


def test_command_that_builds(monkeypatch, tmp_path):
    """A checkout, the folder that it was installed from, or the index."""
    assert _distribution.install_command() == f"pip install -e {ROOT}"
    monkeypatch.setenv("CXX", sys.executable)
    assert _distribution.how_to_build() == f"build it with: PRIME_KERNELS_CPU=ON pip install -e {ROOT}"
    monkeypatch.setattr(_distribution, "__file__", str(tmp_path / "site" / "prime_kernels" / "_distribution.py"))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    info = tmp_path / "site" / "prime_process_rewards-9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {_distribution.NAME}\nVersion: 9\n")
    importlib.invalidate_caches()
    again = "pip install --force-reinstall --no-deps"
    name = _distribution.NAME
    assert _distribution.install_command() == f"{again} --no-cache-dir --no-binary {name} {name}"
    folder = tmp_path / "check out"
    folder.mkdir()
    (info / "direct_url.json").write_text(f'{{"url": "{folder.as_uri()}", "dir_info": {{}}}}')
    assert _distribution.install_command() == f"{again} --no-cache-dir --no-binary {name} {name}"  # it is gone
    (folder / "CMakeLists.txt").touch()
    assert _distribution.install_command() == f"{again} '{folder}'"
