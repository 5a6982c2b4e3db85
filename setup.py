"""A thin shim from setuptools to CMake: CMakeLists.txt is the one build truth, pyproject.toml the one metadata truth.

Environment: PRIME_KERNELS_CPU=AUTO|ON|OFF (OFF builds a wheel of pure Python), PRIME_KERNELS_CUDA=AUTO|ON|OFF,
PRIME_KERNELS_CUDA_ARCHITECTURES="90;100", PRIME_KERNELS_LOCAL_VERSION=cu128 (with PRIME_KERNELS_CUDA=ON, as make
package-cuda has it), CMAKE_BUILD_PARALLEL_LEVEL, CMAKE_ARGS (added last, so it wins).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent


def choice(name: str) -> str:
    value = os.environ.get(name, "AUTO").upper()
    if value not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"prime-process-rewards: {name} must be AUTO, ON or OFF, got {value!r}")
    return value


def find_tool(name: str) -> str:
    # The scripts folder too: `.venv/bin/pip install .` works without activating the environment.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    tool = shutil.which(name, path=path)
    if tool is None:
        raise SystemExit(f"prime-process-rewards: '{name}' is needed to build the extension: pip install {name}")
    return tool


LOCAL_VERSION = os.environ.get("PRIME_KERNELS_LOCAL_VERSION", "")
if LOCAL_VERSION and choice("PRIME_KERNELS_CUDA") != "ON":
    raise SystemExit(
        f"prime-process-rewards: PRIME_KERNELS_LOCAL_VERSION={LOCAL_VERSION!r} names the CUDA kernels of a wheel: "
        f"expected PRIME_KERNELS_CUDA=ON, got {choice('PRIME_KERNELS_CUDA')}"
    )


class LocalVersion(egg_info):
    # Not by setup(options=..): the setup.cfg of an sdist would win.
    def finalize_options(self) -> None:
        self.tag_build = f"+{LOCAL_VERSION}"
        super().finalize_options()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        cmake = find_tool("cmake")
        subprocess.run(
            [
                *[cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"],
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DPRIME_KERNELS_CPU={choice('PRIME_KERNELS_CPU')}",
                f"-DPRIME_KERNELS_CUDA={choice('PRIME_KERNELS_CUDA')}",
                *shlex.split(os.environ.get("CMAKE_ARGS", "")),
            ],
            check=True,
        )
        missing = build / "missing.txt"  # what AUTO went without, in CMake's words
        if missing.exists():
            print(f"prime-process-rewards: no C++ kernels are built: {missing.read_text()}", file=sys.stderr)
            target.unlink(missing_ok=True)
        else:
            subprocess.run([cmake, "--build", str(build)], check=True)


EXTENSION = Extension("prime_kernels._C", sources=[], optional=True)
setup(
    ext_modules=[] if choice("PRIME_KERNELS_CPU") == "OFF" else [EXTENSION],
    cmdclass={"build_ext": CMakeBuild} | ({"egg_info": LocalVersion} if LOCAL_VERSION else {}),
)
