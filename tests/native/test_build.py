"""What was built says so, needs no CUDA library to import, and its CUDA kernels do not spill."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA_FUNCTIONS = ["cuda_log_probs_forward", "cuda_log_probs_backward", "cuda_segment_scan", "cuda_rloo_returns"]


@pytest.fixture(scope="module")
def nvcc():
    path = shutil.which("nvcc")
    if path is None:
        pytest.skip("nvcc is not installed")
    return path


def test_build_info(native):
    info = native.build_info()
    assert set(info) == {"compiler", "flags", "cpu", "openmp", "cuda", "cuda_detail"}
    assert info["cpu"] in ("amx", "avx512_bf16", "avx512", "avx2", "portable")
    assert re.match(r"\w+ \d+", info["compiler"])
    assert "-O3" in info["flags"] and "fast-math" not in info["flags"]
    assert isinstance(info["openmp"], bool) and info["cuda_detail"]
    for name in CUDA_FUNCTIONS:
        assert hasattr(native._C, name) == info["cuda"]


def test_import_needs_no_cuda_library(native):
    if shutil.which("ldd") is None:
        pytest.skip("ldd is not installed")
    needed = subprocess.run(["ldd", native._C.__file__], capture_output=True, text=True, check=True).stdout
    assert "not found" not in needed
    for library in ("libcudart", "libcuda.", "libtorch", "libc10"):
        assert library not in needed


def test_missing_extension_is_explained():
    code = (
        "import sys; sys.modules['prime_kernels._C'] = None\n"
        "from prime_kernels import _native\n"
        "print(_native.unavailable_reason())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert "prime_kernels._C" in said and "pip install" in said


@pytest.fixture(scope="module")
def nvdisasm():
    """From the triton package, which has it wherever it is installed."""
    pytest.importorskip("triton", reason="nvdisasm comes with triton: pip install 'prime-process-rewards[triton]'")
    from triton import knobs

    return knobs.nvidia.nvdisasm.path


# Of the loop over four 16-byte loads a thread, which is a row but for its ends: 32 elements of 16 bits, or 16 of 32.
# Gradients of float32 logits in 16 bits take one conversion for two elements more.
# With entropy; at 3 TB/s an H100 can issue about 640 for 32 elements.
MOST_INSTRUCTIONS = {
    ("forward", "16 bits"): 440,
    ("forward", "float"): 240,
    ("backward", "16 bits"): 340,
    ("backward", "float"): 160,
}


def unrolled_loop(kernel):
    """Instructions of the longest loop with four 16-byte loads in a kernel's machine code."""
    labels, instructions, loops = {}, [], [0]
    for line in kernel.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif re.search(r"/\*[0-9a-f]{4,}\*/", line):
            instructions.append(line)
            if jump := re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line):
                body = instructions[labels.get(jump[1], len(instructions)) :]
                if sum(bool(re.search(r"\bLDG\.E[.\w]*\.128", each)) for each in body) == 4:
                    loops.append(len(body))
    return max(loops)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "op, wide",
    [
        ("candidates", True), ("log_probs", True), ("losses", False), ("prefix_loss", False), ("rloo", False),
        ("segments", False),
    ],
)  # fmt: skip
def test_cuda_kernels_keep_to_registers(nvcc, nvdisasm, tmp_path, op, wide, architecture):
    """No spills, no local memory, and 16 bytes a load where a row is read."""
    source, cubin = ROOT / "csrc" / "cuda" / f"{op}.cu", tmp_path / "a.cubin"
    command = [nvcc, "-std=c++17", f"-arch={architecture}", "-Xptxas", "-v", f"-I{ROOT / 'csrc/include'}", "-cubin"]
    done = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert spills and all(numbers == ("0", "0", "0") for numbers in spills), report
    # 65,536 registers are for a block of 1,024 threads, or for two of 256, as the token passes have them.
    most = 64 if wide else 128
    assert all(int(registers) <= most for registers in re.findall(r"Used (\d+) registers", report)), report
    sass = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b(LDL|STL)\b", sass)
    kernels = re.split(r"^\.text\.", sass, flags=re.MULTILINE)[1:]
    assert len(kernels) == len(spills)
    for kernel in kernels if wide else []:
        which = "backward" if "backward" in kernel[:200] else "forward"
        size = "float" if re.match(r"\S+kernelIf", kernel) else "16 bits"
        assert 50 < unrolled_loop(kernel) <= MOST_INSTRUCTIONS[which, size], kernel[:200]
        # Four loads under way together, and the rest one by one; the backward writes as wide.
        assert len(re.findall(r"\bLDG\.E[.\w]*\.128", kernel)) >= 5, kernel[:200]
        if "backward" in kernel[:200]:
            rounded = re.match(r"\S+kernelIf(6__half|13__nv_bfloat16)", kernel)
            wide = 64 if rounded else 128  # of four columns
            assert len(re.findall(rf"\bSTG\.E[.\w]*\.{wide}", kernel)) >= 5, kernel[:200]


def configure(build, *options, **environment):
    import pybind11

    tools = [shutil.which("cmake"), shutil.which("ninja")]
    beside = Path(sys.executable).parent
    cmake, ninja = (tool or str(beside / name) for tool, name in zip(tools, ("cmake", "ninja"), strict=True))
    if not (Path(cmake).exists() and Path(ninja).exists()):
        pytest.skip("cmake and ninja are not installed")
    command = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_auto_without_a_working_nvcc_builds_for_the_cpu(tmp_path):
    broken = tmp_path / "nvcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    done = configure(tmp_path / "build", CUDACXX=str(broken))
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels AUTO: no working nvcc was found at build time" in done.stdout


def test_default_architectures(nvcc, tmp_path, monkeypatch):
    """Machine code for each kind of GPU that this compiler knows, and PTX for what comes later."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    version = tuple(map(int, re.search(r"release (\d+)\.(\d+)", said).groups()))
    newest = "80-real,86-real,89-real,90-real,100" if version >= (12, 8) else "80-real,86-real,89-real,90"
    if version < (11, 8):
        pytest.skip(f"nvcc {version} knows no sm_89")
    monkeypatch.delenv("PRIME_KERNELS_CUDA_ARCHITECTURES", raising=False)
    done = configure(tmp_path / "build", "-DPRIME_KERNELS_CUDA=ON")
    assert done.returncode == 0, done.stderr
    assert f"architectures {newest}\n" in done.stdout


@pytest.mark.parametrize("choice", ["PRIME_KERNELS_CUDA", "PRIME_KERNELS_CPU"])
def test_unknown_choice_is_an_error(tmp_path, choice):
    done = configure(tmp_path / "build", f"-D{choice}=MAYBE")
    assert done.returncode != 0 and f"{choice} is 'MAYBE', expected AUTO, ON or OFF" in done.stderr


def test_a_compiler_installed_since_is_noticed(tmp_path):
    """In a build folder that was configured without one."""
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    build = tmp_path / "build"
    options = ["-DPRIME_KERNELS_CPU=AUTO", "-DPRIME_KERNELS_CUDA=OFF"]
    done = configure(build, *options, CXX=str(broken))
    assert done.returncode == 0 and "no working C++ compiler was found" in (build / "missing.txt").read_text()
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    done = configure(build, *options, CXX="c++")
    assert done.returncode == 0 and not (build / "missing.txt").exists(), done.stderr
    assert (build / "build.ninja").read_text().count("head_kernels_portable.cpp") > 0
