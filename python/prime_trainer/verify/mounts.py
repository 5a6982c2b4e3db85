"""What a confined process can see of the file system: the arguments of bubblewrap and the paths of Landlock."""

from __future__ import annotations

import glob
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

DEVICES = (["/dev/null", "write"], ["/dev/urandom", "read"], ["/dev/zero", "read"])
"""What a process may open under Landlock beside libraries."""
INSIDE = Path(__file__).parent / "sandboxed"
# Constants: a program that reads them learns nothing. Numerical libraries would start a thread for every core, and
# reasoning-gym imports matplotlib, which wants a folder that looks as if it could be written to.
ENVIRONMENT = {
    "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "MPLCONFIGDIR": "/tmp",
}  # fmt: skip
FILES_BYTES, FILES = 64 << 20, 1024
"""Of a private /tmp: its bytes, and its files and folders."""
_SCORER_PACKAGES = ("math_verify", "latex2sympy2_extended", "antlr4", "sympy", "mpmath", "reasoning_gym", "numpy")


def bubblewrap(packages: Sequence[str], lends: bool, scorers: bool = False) -> list[str]:
    """The command line of bubblewrap up to the program: the standard library and `packages`, or all that scorers need.

    What is mounted later hides what lies below it, and Python, its environment or this folder may lie under /tmp or
    /dev: so the private /tmp and /dev come first.
    """
    words = [
        "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--clearenv",
    ]  # fmt: skip
    # Capabilities that `confine.enter` uses and drops before any program is read: to limit the files of /tmp, and for
    # root to give up its identity. Other users hold the first in a namespace of their own, where they must be root.
    words += [] if lends else ["--unshare-user", "--uid", "0", "--gid", "0"]
    for name in ("CAP_SYS_ADMIN", *(("CAP_SETUID", "CAP_SETGID") if lends else ())):
        words += ["--cap-add", name]
    for name, value in ENVIRONMENT.items():
        words += ["--setenv", name, value]
    words += ["--dev", "/dev", "--size", str(FILES_BYTES), "--perms", "1777", "--tmpfs", "/tmp"]
    below = [*library_paths(), _stdlib(), *([] if scorers else [INSIDE])]
    hidden, above = _site_packages(), scorer_paths() if scorers else _package_paths(tuple(packages))
    for folder in sorted({parent for path in [*below, *above] for parent in path.parents if parent.name}):
        if folder not in (Path("/dev"), Path("/tmp")):
            words += ["--perms", "0755", "--dir", str(folder)]  # else only root could pass through them
    for path in below:
        words += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        words += ["--perms", "0755", "--tmpfs", str(path)]
    for path in above:  # they may lie in what was just hidden
        words += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        if path not in above:
            words += ["--remount-ro", str(path)]
    for link in ("/lib", "/lib64"):
        if os.path.islink(link):
            words += ["--symlink", os.readlink(link), link]
    return [*words, "--remount-ro", "/dev", "--chdir", "/tmp", "--remount-ro", "/", "--"]


def landlock_paths(packages: Sequence[str], scorers: bool = False) -> Iterator[list[str]]:
    """The `[path, rights]` pairs of `confine.enter` for the same."""
    found = scorer_paths() if scorers else [*_package_paths(tuple(packages)), INSIDE]
    for path in [*library_paths(), *found]:
        yield [str(path), "read"]
    for parent in {_stdlib(), *(path.parent for path in found if path != INSIDE)}:
        yield [str(parent), "list"]  # imports list the folder; what else lies in it cannot be opened
    for path in _stdlib().iterdir():
        if path.name not in ("site-packages", "dist-packages") and not path.is_symlink():
            yield [str(path), "read"]
    yield from DEVICES


def _stdlib() -> Path:
    return Path(sysconfig.get_path("stdlib", vars={"installed_base": os.path.realpath(sys.base_prefix)}))


def _site_packages() -> list[Path]:
    return [path for name in ("site-packages", "dist-packages") if (path := _stdlib() / name).is_dir()]


@lru_cache(maxsize=1)
def library_paths() -> list[Path]:
    """The interpreter and the shared libraries of the system, without what else is installed."""
    triple = sysconfig.get_config_var("MULTIARCH") or ""
    found = [Path(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))]
    folders = [f"/usr/lib/{triple}", f"/lib/{triple}"] if triple else []
    for name in [*folders, "/usr/lib64", "/lib64", "/etc/ld.so.cache"]:
        path = Path(os.path.realpath(name))
        if path.exists() and not any(path == p or p in path.parents for p in found):
            found.append(path)
    directory = os.path.realpath(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    found += [Path(p) for p in glob.glob(f"{glob.escape(directory)}/libpython*.so*")]
    return found


@lru_cache(maxsize=8)
def _package_paths(packages: Sequence[str]) -> tuple[Path, ...]:
    found = []
    for name in packages:
        spec = importlib.util.find_spec(name)
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(os.path.realpath(location))
            # Wheels keep the shared libraries that they bring beside the package.
            found += [folder, *(p for p in [folder.with_name(f"{name}.libs")] if p.is_dir())]
    return tuple(found)


def package_folders(packages: Sequence[str]) -> list[str]:
    """The folders from which `packages` are imported."""
    return sorted({str(path.parent) for path in _package_paths(tuple(packages))})


@lru_cache(maxsize=1)
def scorer_paths() -> list[Path]:
    """What the processes that score answers import: the installed packages, and of this one what verifies.

    Not all of `sys.path`: the folder in which the trainer was started may hold anything.
    """
    package = Path(os.path.realpath(__file__)).parent.parent
    installed = [Path(os.path.realpath(p)) for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    found = [path for path in dict.fromkeys(installed) if path.is_dir()]
    own = [package / "__init__.py", package / "errors.py", package / "verify"]
    for path in (*_package_paths(_SCORER_PACKAGES), *own):
        if not any(path == p or p in path.parents for p in found):
            found.append(path)
    return found


def scorer_folders() -> list[str]:
    """`sys.path` of those processes beside the standard library."""
    return list(dict.fromkeys(str(p if p.name.endswith("-packages") else _importable(p)) for p in scorer_paths()))


def _importable(path: Path) -> Path:
    """The folder from which the package at `path`, or the package around it, is imported."""
    folder = path.parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return folder
