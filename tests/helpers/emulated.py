"""The CUDA kernels on the emulator in native/, so that their tests run without a GPU.

As a script it builds the extension with them. As a pytest plugin it puts that extension, named by the environment
variable PRIME_KERNELS_EMULATED, in the place of the real one and lets the backend "cuda" take CPU tensors; or the one
named by PRIME_KERNELS_EMULATED_ISA, whose CPU kernels run on emulated instruction sets.
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
CPU_SOURCES = [*sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ROOT / "csrc" / "bind.cpp"]
SOURCES = [
    *(
        ROOT / "csrc" / "cuda" / f"{name}.cu"
        for name in ("candidates", "log_probs", "losses", "prefix_loss", "rloo", "segments", "status")
    ),
    *CPU_SOURCES,
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
WIDE = {f"{kernels}_avx2": AVX2 for kernels in ("row_kernels", "head_kernels")}
WIDE |= {f"{kernels}_avx512": AVX512 for kernels in ("row_kernels", "head_kernels")}
WIDE["head_kernels_avx512_bf16"] = [*AVX512, "-mavx512bf16"]
WIDE["head_kernels_amx"] = [*WIDE["head_kernels_avx512_bf16"], "-mamx-tile", "-mamx-bf16"]
# Instruction sets of CPUs in plain C++ (emulator/avx512.h), chosen by name alone (emulator/isa.cpp).
ISA_SOURCES = [*(source for source in CPU_SOURCES if source.stem != "isa"), EMULATOR / "isa.cpp"]
PLAIN = ["-include", str(EMULATOR / "avx512.h"), "-ffp-contract=off", "-O2", "-Wno-psabi"]
ISA_FLAGS = {f"{kernels}_avx2": AVX2 for kernels in ("row_kernels", "head_kernels")}
ISA_FLAGS |= {f"{kernels}_avx512": PLAIN for kernels in ("row_kernels", "head_kernels")}
ISA_FLAGS["head_kernels_avx512_bf16"] = [*PLAIN, "-DPK_EMULATE_BF16"]
ISA_FLAGS["head_kernels_amx"] = [*ISA_FLAGS["head_kernels_avx512_bf16"], "-DPK_EMULATE_AMX"]


def build(folder: Path) -> Path:
    """The module with the token passes for GPUs: its path. RuntimeError with what the compiler said."""
    return _build(folder, SOURCES, ["-O1", "-w", "-DPK_HAS_CUDA", "-DPK_SMALL_TILES"], WIDE)


def build_instruction_sets(folder: Path) -> Path:
    """The module with every instruction set of CPUs, those of AVX-512 and AMX emulated: its path."""
    return _build(folder, ISA_SOURCES, ["-O1", "-w", "-fopenmp"], ISA_FLAGS)


def _build(folder: Path, sources: list[Path], flags: list[str], by_stem: dict[str, list[str]]) -> Path:
    import pybind11

    compiler = shutil.which("c++")
    if compiler is None:
        raise RuntimeError("no C++ compiler")
    includes = [
        EMULATOR,
        ROOT / "csrc",
        ROOT / "csrc" / "include",
        ROOT / "csrc" / "cpu",
        pybind11.get_include(),
        sysconfig.get_paths()["include"],
    ]
    common = [compiler, "-std=c++17", "-fPIC", "-fvisibility=hidden", *flags]
    common += [f'-DPK_BUILD_{name}="emulated"' for name in ("COMPILER", "FLAGS", "CUDA_DETAIL")]
    common += [f"-I{path}" for path in includes]

    def compile_one(source: Path) -> Path:
        out = folder / f"{source.stem}{source.suffix}.o"
        run([*common, *by_stem.get(source.stem, []), "-x", "c++", "-c", str(source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    module = folder / "_C.so"
    run([compiler, "-shared", *flags, "-o", str(module), *map(str, objects)])
    return module


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-4000:])


class Rows:
    """The extension as the row kernels see it: what they call for CPU tensors goes to the CUDA kernels."""

    def __init__(self, extension) -> None:
        self.extension = extension

    def log_probs_forward(self, *, n_threads, **arguments) -> None:
        self.extension.cuda_log_probs_forward(**arguments, stream=0)

    def log_probs_backward(self, *, n_threads, **arguments) -> None:
        self.extension.cuda_log_probs_backward(**arguments, stream=0)

    def candidates(self, *, n_threads, **arguments) -> None:
        self.extension.cuda_candidates(**arguments, stream=0)


def load(module: Path) -> None:
    """Put this extension in the place of the real one."""
    spec = importlib.util.spec_from_file_location("prime_kernels._C", module)
    sys.modules["prime_kernels._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["prime_kernels._C"])


def install(module: Path) -> None:
    load(module)
    from prime_kernels import _dispatch, _native
    from prime_kernels._native import packed, rows

    real = _dispatch._device_types
    _dispatch._device_types = lambda name: ("cpu",) if name == "cuda" else real(name)
    _native.cuda_unavailable_reason = lambda: None

    def launch(self, kernel, device, **arguments):
        getattr(_native._C, f"cuda_{kernel}")(**packed._addresses(arguments), stream=0)

    packed.CudaKernels._launch = launch
    rows._C = Rows(_native._C)


def pytest_collection_modifyitems(config, items) -> None:
    """For the CUDA kernels only what runs on a backend: the rest would repeat what runs without an emulator."""
    if "PRIME_KERNELS_EMULATED" in os.environ:
        chosen = [each for each in items if "backend" in each.fixturenames]
        config.hook.pytest_deselected(items=[each for each in items if each not in chosen])
        items[:] = chosen


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
elif "PRIME_KERNELS_EMULATED" in os.environ:
    install(Path(os.environ["PRIME_KERNELS_EMULATED"]))
elif "PRIME_KERNELS_EMULATED_ISA" in os.environ:
    load(Path(os.environ["PRIME_KERNELS_EMULATED_ISA"]))
