"""Wheels for GPUs are named after the CUDA release of the nvcc that builds them.

None is built here: `make package-cuda` does that and tests what it built.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename
from packaging.version import Version

import prime_kernels

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "wheels.md").read_text(encoding="utf-8")
TAGS = ("cu126", "cu128", "cu130")
SAYS = """nvcc: NVIDIA (R) Cuda compiler driver
Copyright (c) 2005-2025 NVIDIA Corporation
Cuda compilation tools, release {release}, V{release}.93
Build cuda_{release}.r{release}/compiler.1_0
"""


def nvcc(folder, release):
    tool = folder / "nvcc"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{SAYS.format(release=release)}END\n")
    tool.chmod(0o755)
    return tool


def make(*arguments):
    return subprocess.run(["make", "-s", "-C", ROOT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("release, tag", [("12.6", "cu126"), ("12.8", "cu128"), ("13.0", "cu130")])
def test_tag_is_that_of_nvcc(tmp_path, release, tag):
    done = make("cuda-tag", f"NVCC={nvcc(tmp_path, release)}")
    assert (done.returncode, done.stdout.strip()) == (0, tag), done.stderr


@pytest.mark.parametrize("target", ["cuda-tag", "package-cuda"])
def test_other_releases_and_none_are_refused(tmp_path, target):
    for tool, got in ((nvcc(tmp_path, "12.4"), "cu124"), (tmp_path / "absent", "none")):
        done = make(target, f"NVCC={tool}")
        assert done.returncode != 0 and not done.stdout
        assert f"NVCC: expected the nvcc of one of {' '.join(TAGS)}, got {got} from {tool}" in done.stderr


def version_of(folder, **environment):
    """What setup.py writes into the metadata of a wheel, which has its name from there; nothing is compiled."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PRIME_KERNELS_")}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder],
        capture_output=True, text=True, cwd=ROOT, env={**kept, **environment},
    )  # fmt: skip
    if done.returncode:
        return done.stderr.strip()
    (info,) = folder.glob("*/PKG-INFO")
    return re.search(r"^Version: (.*)$", info.read_text(), re.MULTILINE)[1]


@pytest.mark.parametrize("tag", TAGS)
def test_local_version(tmp_path, tag):
    version = version_of(tmp_path, PRIME_KERNELS_CUDA="ON", PRIME_KERNELS_LOCAL_VERSION=tag)
    assert version == f"{prime_kernels.__version__}+{tag}"
    name = f"prime_process_rewards-{version}-cp311-cp311-manylinux_2_34_x86_64.whl"
    assert parse_wheel_filename(name)[1] == Version(version) > Version(prime_kernels.__version__)
    assert f"`+{tag}`" in PAGE


def test_no_local_version_without_cuda_kernels(tmp_path):
    assert version_of(tmp_path) == prime_kernels.__version__
    for cuda in ({}, {"PRIME_KERNELS_CUDA": "OFF"}):
        said = version_of(tmp_path, PRIME_KERNELS_LOCAL_VERSION="cu128", **cuda)
        assert "PRIME_KERNELS_LOCAL_VERSION='cu128' names the CUDA kernels of a wheel: expected" in said


def test_the_plain_wheel_is_for_cpus_wherever_it_is_built():
    recipe = make("-n", "package").stdout
    assert "PRIME_KERNELS_CUDA=OFF" in recipe and "LOCAL_VERSION" not in recipe


def test_this_nvcc_compiles_for_every_gpu_that_the_page_names(tmp_path):
    """The smallest of the CUDA files, as `make package-cuda` compiles all; with another nvcc, what the page says."""
    compiler, pybind11 = shutil.which("nvcc"), pytest.importorskip("pybind11")
    if compiler is None:
        pytest.skip("nvcc is not on the path")
    where = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])
    tools = [shutil.which(name, path=where) for name in ("cmake", "ninja")]
    if None in tools:
        pytest.skip("cmake or ninja is not there: pip install cmake ninja")
    tag = make("cuda-tag", f"NVCC={compiler}").stdout.strip()
    if tag not in TAGS:
        pytest.skip(f"the nvcc on the path is not of one of {', '.join(TAGS)}")
    configure = [tools[0], "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools[1]}"]
    configure += [
        "-DPRIME_KERNELS_CUDA=ON",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    clean = {name: value for name, value in os.environ.items() if name != "PRIME_KERNELS_CUDA_ARCHITECTURES"}
    said = subprocess.run(configure, capture_output=True, text=True, env=clean | {"CUDACXX": compiler})
    assert said.returncode == 0, said.stderr
    (built_for,) = re.findall(r"CUDA kernels ON: nvcc [\d.]+, architectures (.*)", said.stdout)
    (named,) = re.findall(rf"^\| `\+{tag}` \| [\d.]+ \| ([\d., ]+); PTX of", PAGE, re.M)
    assert [f"{int(each.partition('-')[0]) / 10}" for each in built_for.split(",")] == named.split(", ")
    smallest = "CMakeFiles/pk_cuda.dir/csrc/cuda/status.cu.o"
    done = subprocess.run([tools[1], "-C", tmp_path, smallest], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / smallest).stat().st_size > 0, done.stdout + done.stderr
