"""What a process in a sandbox gives up, by its own system calls: limits, identity, paths, and nearly all system calls.

bubblewrap gives it namespaces and an almost empty file system before; where there is no bubblewrap, Landlock takes the
file system away here. Every step that is asked for and fails ends the process: nothing runs half confined.
"""

from __future__ import annotations

import base64
import ctypes
import math
import os
import resource
import signal
import struct
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_KEEPCAPS = 1, 4, 8
_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38
_CLONE_NEWUSER = 0x10000000
_CAPABILITY_VERSION_3, _CAP_DAC_READ_SEARCH = 0x20080522, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3

_MS_REMOUNT = 32 | 2 | 4  # and still nosuid and nodev

THREADS = 64

_libc = ctypes.CDLL(None, use_errno=True)


def enter(cfg: dict[str, Any]) -> None:
    """Confines this process as `cfg` says; see `sandbox.Confinement`. Raises OSError where a step is not possible."""
    die_with_parent()
    if cfg["files"] is not None:
        _limit_files(*cfg["files"])
    limit(cfg["limits"])
    if cfg["uid"] is not None:
        if cfg["landlock"] is not None:
            _prctl(_PR_SET_KEEPCAPS, 1)  # the interpreter may lie where only root reads; Landlock says which paths
        os.setgroups([])
        os.setresgid(cfg["uid"], cfg["uid"], cfg["uid"])
        os.setresuid(cfg["uid"], cfg["uid"], cfg["uid"])
        die_with_parent()  # a change of identity clears it
    # Threads are counted for each identity in each user namespace: where the trainer's count, there is no limit.
    if cfg["threads"] == "count" or _leave(cfg["threads"]):
        limit({"nproc": cfg.get("processes", THREADS)})
    keep = cfg["uid"] is not None and cfg["landlock"] is not None
    _capset(1 << _CAP_DAC_READ_SEARCH if keep else 0)
    _prctl(_PR_SET_DUMPABLE, 0)  # no other process of this user reads or traces it
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    if cfg["landlock"] is not None:
        _landlock(cfg["landlock"])


def die_with_parent() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit_files(folder: str, size: int, count: int) -> None:
    """Bounds a tmpfs in files and folders too: each takes a kilobyte of the kernel's memory, however empty it is."""
    options = f"size={size},nr_inodes={count},mode=1777".encode()
    _check(_libc.mount(None, folder.encode(), None, ctypes.c_ulong(_MS_REMOUNT), options), f"mount {folder}")


def _leave(wish: str | None) -> bool:
    """Enters a user namespace of its own if that is "needed", or "wanted" and possible."""
    if wish is None:
        return False
    left = _libc.unshare(_CLONE_NEWUSER)
    if wish == "needed":
        _check(left, "unshare")
    return left == 0


def limit(limits: dict[str, int]) -> None:
    """Sets both the soft and the hard limits; `{"as": bytes, ..}` with the names of setrlimit(2) in lower case."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (value, value))


def seal(cfg: dict[str, Any]) -> None:
    """The last step before foreign code runs: only the system calls of the filter are left, for good."""
    die_with_parent()
    seconds = math.ceil(cfg["seconds"]) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    if cfg["seccomp"] is not None:
        filter_calls(base64.b64decode(cfg["seccomp"]))


def filter_calls(filters: bytes) -> None:
    """Leaves the system calls of a filter of seccomp.py alone, for good."""
    code = ctypes.create_string_buffer(filters, len(filters))
    program = struct.pack("HP", len(filters) // 8, ctypes.addressof(code))
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def _landlock(paths: list[list[Any]]) -> None:
    """Refuses every path but `paths`: `[path, rights]` with rights "read", "list" (names in it) or "write"."""
    abi = _libc.syscall(_LANDLOCK_CREATE, None, 0, 1)
    _check(abi, "Landlock")
    rights = (1 << (13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16)) - 1
    attributes = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    attributes = attributes[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _libc.syscall(_LANDLOCK_CREATE, attributes, len(attributes), 0)
    _check(ruleset, "landlock_create_ruleset")
    for path, kind in paths:
        allowed = {"read": _READ_FILE, "list": _READ_DIR, "write": _READ_FILE | _WRITE_FILE}[kind]
        if kind == "read" and os.path.isdir(path):
            allowed |= _READ_DIR
        fd = os.open(path, os.O_PATH)
        rule = struct.pack("=Qi", allowed, fd)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"landlock_add_rule {path}")
        os.close(fd)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _capset(mask: int) -> None:
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _check(_libc.capset(header, struct.pack("6I", mask, mask, 0, 0, 0, 0)), "capset")


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl {option}")


def _check(result: int, what: str) -> None:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
