"""The trainer's side of a sandbox: which confinement works on this machine, and one confined process with its pipes."""

from __future__ import annotations

import base64
import glob
import importlib.util
import itertools
import json
import os
import random
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError
from .seccomp import program_filter

Kind = Literal["bubblewrap", "landlock", "unsafe"]
KINDS: tuple[Kind, ...] = ("bubblewrap", "landlock")

START_SECONDS = 30.0
_INSIDE = Path(__file__).parent / "sandboxed"
_FILES_BYTES, _FILE_BYTES = 64 << 20, 16 << 20
_DESCRIPTORS = 128
# Constants: a program that reads them learns nothing. Numerical libraries would start a thread for every core.
_ENVIRONMENT = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
DEVICES = (["/dev/null", "write"], ["/dev/urandom", "read"], ["/dev/zero", "read"])
"""What a process may open under Landlock beside libraries."""
# Numbers that systemd leaves to nobody. No limit on processes holds for root, so root lends other identities.
_IDENTITIES = range(60578, 61184)
_identity = itertools.count(random.SystemRandom().randrange(len(_IDENTITIES)))


class SandboxError(RunError):
    """No sandbox can run programs here; the message says what to install."""


class Expired(Exception):
    """The time limit passed."""


class Ended(Exception):
    """The process ended, or said what it should not."""


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds on the clock from its first instruction, and MiB of address space."""

    seconds: float = 10.0
    memory_mb: int = 1024


@dataclass(frozen=True)
class Confinement:
    """How programs are confined; `packages` are the importable ones beside the standard library."""

    kind: Kind
    packages: tuple[str, ...] = ()

    def launch(self, mode: str, limits: Limits, peer: tuple[int, int] | None = None) -> list[str]:
        """The command of a confined process in one of the modes of `inside/__main__.py`."""
        lends = self.kind != "unsafe" and os.geteuid() == 0 and _whole_uid_map()
        uid = _IDENTITIES[next(_identity) % len(_IDENTITIES)] if lends else None
        landlock = self.kind == "landlock"
        # A lent identity is alone with its threads, and so is what bubblewrap puts into a user namespace. Root's lent
        # ones enter another namespace only under bubblewrap: it would take away the right to read root's files.
        threads = {"bubblewrap": "needed" if lends else "count", "landlock": "count" if lends else "wanted"}.get(
            self.kind
        )
        bounds = {
            "as": limits.memory_mb << 20, "fsize": _FILE_BYTES, "nofile": _DESCRIPTORS, "core": 0,
            "memlock": 0, "msgqueue": 0,
        }  # fmt: skip
        cfg = {
            "mode": mode,
            "seconds": limits.seconds,
            "limits": bounds,
            "uid": uid,
            "threads": threads,
            "landlock": [*_landlock_paths(self.packages)] if landlock else None,
            "seccomp": None if self.kind == "unsafe" else base64.b64encode(program_filter()).decode(),
            "packages": sorted({str(path.parent) for path in _package_paths(self.packages)}),
            "peer": peer,
        }
        python = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        command = [python, "-I", "-S", "-X", "utf8", str(_INSIDE), json.dumps(cfg)]
        return [*_bubblewrap(self.packages, lends), *command] if self.kind == "bubblewrap" else command


def _whole_uid_map() -> bool:
    """Whether this user namespace has the identities that are lent out."""
    try:
        rows = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return False
    return any(first <= _IDENTITIES[0] and _IDENTITIES[-1] < first + count for first, _, count in rows)


def _bubblewrap(packages: Sequence[str], lends: bool) -> list[str]:
    words = [
        "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try",
        "--die-with-parent", "--clearenv",
    ]  # fmt: skip
    # Root gives up its identity inside, which needs two capabilities for a moment, and enters a user namespace then.
    words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if lends else ["--unshare-user"]
    for name, value in _ENVIRONMENT.items():
        words += ["--setenv", name, value]
    below, hidden, above = [*library_paths(), _stdlib(), _INSIDE], _site_packages(), _package_paths(packages)
    for folder in sorted({parent for path in [*below, *above] for parent in path.parents if parent.name}):
        words += ["--perms", "0755", "--dir", str(folder)]  # else only root could pass through them
    for path in below:
        words += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        words += ["--perms", "0755", "--tmpfs", str(path)]
    for path in above:  # they may lie in what was just hidden
        words += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        words += ["--remount-ro", str(path)]
    for link in ("/lib", "/lib64"):
        if os.path.islink(link):
            words += ["--symlink", os.readlink(link), link]
    return [
        *words, "--dev", "/dev", "--remount-ro", "/dev", "--size", str(_FILES_BYTES), "--perms", "1777",
        "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/", "--",
    ]  # fmt: skip


def _landlock_paths(packages: Sequence[str]) -> Iterator[list[str]]:
    for path in [*library_paths(), *_package_paths(packages), _INSIDE]:
        yield [str(path), "read"]
    for parent in {_stdlib(), *(path.parent for path in _package_paths(packages))}:
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


class Session:
    """One confined process; messages go both ways. Its deadline starts when it is ready, before the first program."""

    def __init__(self, confinement: Confinement, mode: Literal["run", "calls", "tests"], limits: Limits) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._held = bytearray()
        self._limits = limits
        try:
            self._start(confinement, mode)
        except BaseException:
            self.close()
            raise

    def _start(self, confinement: Confinement, mode: str) -> None:
        if mode == "tests":
            # The tests talk to the program's sandbox directly; the trainer hears the tests' result alone.
            to_program, from_program = os.pipe(), os.pipe()
            ends = (*to_program, *from_program)
            try:
                self._spawn(confinement.launch("calls", self._limits), to_program[0], from_program[1])
                peer = (from_program[0], to_program[1])
                process = self._spawn(confinement.launch("tests", self._limits, peer), pass_fds=peer)
            finally:
                for end in ends:
                    os.close(end)
        else:
            process = self._spawn(confinement.launch(mode, self._limits))
        assert process.stdin is not None and process.stdout is not None
        self._requests, self._replies = process.stdin.fileno(), process.stdout.fileno()
        os.set_blocking(self._requests, False)
        os.set_blocking(self._replies, False)
        self.deadline = time.monotonic() + START_SECONDS
        try:
            ready = self.receive(1 << 10)
        except (Ended, Expired) as error:
            raise SandboxError(f"it does not start: {self._last_words() or type(error).__name__}") from None
        if ready != {"ready": True}:
            raise SandboxError(f"it does not start: it said {ready!r:.100}")
        self.deadline = time.monotonic() + self._limits.seconds

    def _spawn(
        self, command: list[str], stdin: int = subprocess.PIPE, stdout: int = subprocess.PIPE, **options: Any
    ) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            command, stdin=stdin, stdout=stdout, stderr=self._errors, bufsize=0, env=_ENVIRONMENT, cwd="/",
            start_new_session=True, **options,
        )  # fmt: skip
        self._processes.append(process)
        return process

    def ask(self, message: dict[str, Any], cap: int) -> dict[str, Any]:
        """Sends a message and returns the reply of at most `cap` bytes. Raises Expired or Ended."""
        self.send(message)
        return self.receive(cap)

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait(self._requests, selectors.EVENT_WRITE)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended from None

    def receive(self, cap: int) -> dict[str, Any]:
        seen = 0
        while b"\n" not in memoryview(self._held)[seen:].tobytes():
            seen = len(self._held)
            self._wait(self._replies, selectors.EVENT_READ)
            try:
                chunk = os.read(self._replies, 1 << 16)
            except BlockingIOError:
                continue
            self._held += chunk
            if not chunk or len(self._held) > cap:
                raise Ended
        line, _, self._held = self._held.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            raise Ended from None
        if not isinstance(message, dict):
            raise Ended
        return message

    def _wait(self, fd: int, event: int) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(fd, event)
            if not selector.select(max(0.0, self.deadline - time.monotonic())):
                raise Expired

    def _last_words(self) -> str:
        for process in self._processes:
            process.kill()
            process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """Ends everything in the sandbox, from any thread; whoever waits for a reply gets Ended."""
        for process in self._processes:
            _kill_group(process)

    def close(self) -> None:
        """Kills everything in the sandbox and waits for it."""
        self.kill()
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    if pipe is process.stdout:
                        _drain(pipe.fileno())
                    pipe.close()
        self._processes.clear()
        self._errors.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    # Programs cannot leave the group (no fork, no setsid); bubblewrap's processes die with its first one.
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            process.kill()


def _drain(fd: int, seconds: float = 2.0) -> None:
    """Reads to the end, which comes when the last process that holds the other side is gone."""
    os.set_blocking(fd, False)
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            if not os.read(fd, 1 << 16):
                return


@lru_cache(maxsize=8)
def obstacle(kind: Kind, packages: tuple[str, ...] = ()) -> str | None:
    """Why `kind` cannot confine programs on this machine; None where it can. Tried once, with a small program."""
    if kind == "bubblewrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed (apt-get install bubblewrap)"
    try:
        if kind != "unsafe":
            program_filter()
    except OSError as error:
        return f"libseccomp is not installed (apt-get install libseccomp2): {error}"
    confine, limits = Confinement(kind, packages), Limits()
    try:
        with Session(confine, "calls", limits) as session:
            loaded = session.ask({"programs": ["import decimal\ndef probe(x):\n    return x + 1"]}, 1 << 10)
            called = session.ask({"name": "probe", "args": [41]}, 1 << 10)
        with Session(confine, "run", limits) as session:
            session.send({"programs": ["print(input())"]})
            ran = session.ask({"stdin": "42\n", "limit": 1 << 10}, 1 << 10)
    except (Ended, Expired, SandboxError, OSError) as error:
        return f"{kind} does not work here: {str(error) or type(error).__name__}"
    works = (loaded, called, ran.get("stdout")) == ({"loaded": True}, {"value": 42}, "42\n")
    return None if works else f"{kind} does not run programs here: {loaded}, {called}, {ran}"


def confinement(wanted: str, packages: Sequence[str] = (), allow_unsafe: bool = False) -> Confinement:
    """The best confinement that works here, or the `wanted` one if that is not "auto".

    Raises SandboxError with every reason where none does, unless `allow_unsafe`: programs then run with limits on their
    resources alone.
    """
    packages, reasons = tuple(packages), []
    for kind in KINDS if wanted == "auto" else (wanted,):
        reason = obstacle(kind, packages)
        if reason is None:
            return Confinement(kind, packages)
        reasons.append(reason)
    if allow_unsafe and wanted == "auto":
        return Confinement("unsafe", packages)
    raise SandboxError(
        f"no sandbox can run the programs of code problems: {'; '.join(reasons)}. Install bubblewrap "
        "(apt-get install bubblewrap libseccomp2), or set task.allow_unsafe = true to run programs of the model with "
        "this user's rights"
    )
