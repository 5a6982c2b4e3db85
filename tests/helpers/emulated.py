"""The CUDA kernels over packed tokens on the emulator in native/, so that their tests run without one.

As a script it builds the extension with them. As a pytest plugin it puts that extension, named by the environment
variable PRIME_KERNELS_EMULATED, in the place of the real one and lets the backend "cuda" take CPU tensors.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "tests" / "native" / "emulator"
SOURCES = [
    *(ROOT / "csrc" / "cuda" / f"{name}.cu" for name in ("losses", "prefix_loss", "rloo", "segments", "status")),
    *sorted((ROOT / "csrc" / "cpu").glob("*.cpp")),
    ROOT / "csrc" / "bind.cpp",
    EMULATOR / "rest.cpp",
]
WIDE = {"row_kernels_avx2": ["-mavx2", "-mfma", "-mf16c"]}
WIDE["row_kernels_avx512"] = [*WIDE["row_kernels_avx2"], *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]


def build(folder: Path) -> Path:
    """The module's path; RuntimeError with what the compiler said."""
    import pybind11

    compiler = shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    includes = [EMULATOR, ROOT / "csrc" / "include", pybind11.get_include(), sysconfig.get_paths()["include"]]
    common = [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-fvisibility=hidden", "-DPK_HAS_CUDA"]
    common.append("-DPK_SMALL_TILES")
    common += [f'-DPK_BUILD_{name}="emulated"' for name in ("COMPILER", "FLAGS", "CUDA_DETAIL")]
    common += [f"-I{path}" for path in includes]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}{source.suffix}.o"
        run([*common, *WIDE.get(source.stem, []), "-x", "c++", "-c", str(source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    module = folder / "_C.so"
    run([compiler, "-shared", "-o", str(module), *map(str, objects)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])


def install(module: Path) -> None:
    spec = importlib.util.spec_from_file_location("prime_kernels._C", module)
    sys.modules["prime_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["prime_kernels._C"])
    from prime_kernels import _dispatch, _native
    from prime_kernels._native import packed

    real = _dispatch._device_types
    _dispatch._device_types = lambda name: ("cpu",) if name == "cuda" else real(name)
    _native.cuda_unavailable_reason = lambda: None

    def launch(self, kernel, device, **arguments):
        getattr(_native._C, f"cuda_{kernel}")(**packed._addresses(arguments), stream=0)

    packed.CudaKernels._launch = launch


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
elif "PRIME_KERNELS_EMULATED" in os.environ:
    install(Path(os.environ["PRIME_KERNELS_EMULATED"]))
