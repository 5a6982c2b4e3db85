"""Installs the wheels of dist/ in root file systems that hold a distribution's base system alone, and uses them there.

usage: python tests/packaging/try_wheels.py --dist dist --roots build/roots --work build/try
           [--versions 3.11 3.12 3.13] [--page docs/wheels.md]

Each folder of ``--roots`` is a root file system with some python3 and its venv module, as debootstrap makes it: no
compiler, no CMake, no torch. bubblewrap enters it without a network. A Python that the distribution does not have is
lent by this machine (``PYTHONS``, a list of installation prefixes). torch is installed once for each version of Python
outside and lent as well. What cannot be tried is in the table with its reason; what fails ends the script with 1.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("3.11", "3.12", "3.13")
ISAS = ("", "avx2", "portable")
MARKS = ("<!-- tried -->", "<!-- end of tried -->")


class Row(NamedTuple):
    distribution: str
    glibc: str
    python: str
    wheel: str
    result: str

    @property
    def failed(self) -> bool:
        return self.result.startswith("FAILED")


def in_root(root: Path, *command: str, bind: dict[Path, str], environment: dict[str, str] | None = None) -> str:
    """Output of a command in the root file system, which is read-only but for /tmp; raises CalledProcessError."""
    lent = [part for source, target in bind.items() for part in ("--ro-bind", str(source), target)]
    kept = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LC_ALL": "C.UTF-8", **(environment or {})}
    # A lent Python may have its library in a folder of its own.
    kept |= {"LD_LIBRARY_PATH": "/mnt/python/lib"} if "/mnt/python" in bind.values() else {}
    variables = [part for name, value in kept.items() for part in ("--setenv", name, value)]
    sandbox = [
        "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--new-session",
        "--clearenv",
        "--ro-bind",
        str(root),
        "/",
    ]
    # What is lent lies in /mnt, which every root has. /tmp is on the disk and not in memory.
    scratch = ["--dev", "/dev", "--proc", "/proc", "--tmpfs", "/mnt", "--bind", str(scratch_of(root)), "/tmp"]
    done = subprocess.run(
        [*sandbox, *scratch, *lent, *variables, "--chdir", "/tmp", *command],
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout.strip()


def scratch_of(root: Path) -> Path:
    folder = root.parent / f"{root.name}.tmp"
    folder.mkdir(exist_ok=True)
    return folder


def interpreter(root: Path, version: str) -> tuple[str, dict[Path, str]] | None:
    """(path in the root, what must be lent for it), or None."""
    if (root / "usr/bin" / f"python{version}").exists():
        return f"/usr/bin/python{version}", {}
    for prefix in map(Path, os.environ.get("PYTHONS", "").split()):
        if (prefix / "bin" / f"python{version}").exists():
            return f"/mnt/python/bin/python{version}", {prefix: "/mnt/python"}
    return None


def torch_for(version: str, work: Path) -> Path | None:
    """A folder with torch for that version of Python; pip installs it, once, from this machine's interpreter of it."""
    folder, python = work / f"torch-{version}", shutil.which(f"python{version}")
    for prefix in map(Path, os.environ.get("PYTHONS", "").split()):
        python = str(found) if (found := prefix / "bin" / f"python{version}").exists() else python
    if python is None:
        return None
    if not (folder / "torch").exists():
        wanted = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--python",
            python,
            "install",
            "-q",
            "--no-compile",
            "--no-warn-script-location",
        ]
        subprocess.run([*pip, "--target", str(folder), wanted, "numpy"], check=True)
    return folder


def use(root: Path, python: str, lent: dict[Path, str], wheel: Path, torch: Path) -> str:
    """Installs a wheel in an environment of its own and uses it; what it says."""
    shutil.rmtree(scratch_of(root) / "env", ignore_errors=True)
    bind = {**lent, wheel.parent: "/mnt/dist", torch: "/mnt/torch", Path(__file__).parent: "/mnt/try"}
    in_root(root, python, "-m", "venv", "/tmp/env", bind=bind)
    for tool in ("cc", "c++", "gcc", "cmake", "nvcc"):
        if shutil.which(tool, path=f"{root}/usr/bin:{root}/bin"):
            raise RuntimeError(f"{root} has {tool}: it is to show an installation without a compiler")
    pip = ["/tmp/env/bin/python", "-m", "pip", "install", "-q", "--no-index", "--no-deps", f"/mnt/dist/{wheel.name}"]
    in_root(root, *pip, bind=bind)
    pure = wheel.name.endswith("-none-any.whl")
    said = []
    # The narrower instruction sets once a distribution, with the Python that it has.
    for isa in ("",) if pure or lent else ISAS:
        command = ["/tmp/env/bin/python", "/mnt/try/use_wheel.py", "/mnt/torch", *(["--pure"] if pure else [])]
        said.append(in_root(root, *command, bind=bind, environment={"PRIME_KERNELS_CPU_ISA": isa} if isa else {}))
    return said[0] if pure else "works on " + ", ".join(each.removeprefix("works on ") for each in said)


def rows(dist: Path, roots: list[Path], work: Path, versions: list[str]) -> list[Row]:
    found = []
    for root in roots:
        release = dict(line.split("=", 1) for line in (root / "etc/os-release").read_text().splitlines() if "=" in line)
        name = release["PRETTY_NAME"].strip('"')
        glibc = in_root(root, "getconf", "GNU_LIBC_VERSION", bind={}).removeprefix("glibc ")
        for version in versions:
            tag = f"cp{version.replace('.', '')}"
            wheels = [*dist.glob(f"*-{tag}-{tag}-*.whl"), *dist.glob("*-none-any.whl")]
            python = interpreter(root, version)
            torch = torch_for(version, work) if python else None
            for wheel in wheels or [Path(f"none for {tag}")]:
                kind = "pure Python" if wheel.name.endswith("-none-any.whl") else wheel.name.rpartition("-")[2][:-4]
                if not wheel.exists():
                    found.append(Row(name, glibc, version, "-", f"not tried: {dist} has no wheel for {tag}"))
                elif python is None:
                    found.append(Row(name, glibc, version, kind, f"not tried: no Python {version} there or in PYTHONS"))
                elif torch is None:
                    found.append(
                        Row(name, glibc, version, kind, f"not tried: no Python {version} to install torch with")
                    )
                else:
                    path, lent = python
                    try:
                        result = use(root, path, lent, wheel, torch)
                    except (subprocess.SubprocessError, RuntimeError) as error:
                        result = f"FAILED: {str(getattr(error, 'stderr', None) or error).strip().splitlines()[-1]}"
                    whose = "its own" if not lent else "lent"
                    found.append(Row(name, glibc, f"{version}, {whose}", kind, result))
                print(*found[-1], sep=" | ", flush=True)
    return found


def table(found: list[Row]) -> str:
    lines = ["| distribution | glibc | Python | wheel | |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in found)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dist", type=Path, required=True)
    parser.add_argument("--roots", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--versions", nargs="+", default=[*VERSIONS], help="of Python")
    parser.add_argument("--page", type=Path, help="a page whose table between two marks is written anew")
    options = parser.parse_args()
    roots = sorted(each.resolve() for each in options.roots.glob("*") if (each / "etc/os-release").exists())
    if not roots or shutil.which("bwrap") is None:
        print(f"skipped: {'bubblewrap is not installed' if roots else f'{options.roots} has no root file systems'}")
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    found = rows(options.dist.resolve(), roots, options.work.resolve(), options.versions)
    if options.page:
        before, _, rest = options.page.read_text(encoding="utf-8").partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        text = f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}"
        options.page.write_text(text, encoding="utf-8")
    return int(any(row.failed for row in found))


if __name__ == "__main__":
    sys.exit(main())
