"""The system calls that a program or a scorer needs to compute, as seccomp filters; every other one fails with ENOSYS.

A list of what is allowed: a system call that a later kernel brings is refused. libseccomp knows the numbers of each
architecture.
"""

from __future__ import annotations

import ctypes
import errno
import os
import tempfile
from functools import lru_cache

_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_ATTRIBUTE_BAD_ARCHITECTURE = 2
_EQUAL, _MASKED_EQUAL = 4, 7

_ALLOWED = """
read write readv writev pread64 pwrite64 preadv pwritev lseek _llseek close close_range dup dup2 dup3 pipe pipe2
fstat stat lstat newfstatat statx fstatfs statfs access faccessat faccessat2 open openat getdents64 getcwd chdir fchdir
readlink readlinkat mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 ftruncate fsync fdatasync flock umask
mmap munmap mremap mprotect madvise brk msync mincore
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause restart_syscall
alarm setitimer getitimer clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time times
getpid getppid gettid getuid geteuid getgid getegid getgroups getresuid getresgid getpgrp getpgid getsid
futex futex_waitv set_robust_list get_robust_list rseq membarrier getcpu
sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_get_priority_max sched_get_priority_min
uname sysinfo getrusage getrlimit getrandom exit exit_group wait4 waitid
poll ppoll select pselect6 epoll_create1 epoll_ctl epoll_wait epoll_pwait eventfd2
socketpair sendto recvfrom sendmsg recvmsg shutdown
""".split()  # noqa: SIM905 (a hundred words read better than a hundred literals)

# A scorer reads its libraries and writes its result: no thread, no signal but its own, nothing made or changed.
_SCORER = """
read write readv pread64 lseek close fstat stat lstat newfstatat statx access faccessat faccessat2
getdents64 getcwd readlink readlinkat mmap munmap mremap mprotect madvise brk
rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall clock_gettime clock_getres clock_nanosleep
nanosleep gettimeofday time times getpid gettid getuid geteuid getgid getegid futex set_robust_list rseq membarrier
getcpu sched_yield sched_getaffinity uname sysinfo getrusage getrlimit getrandom exit exit_group poll
""".split()  # noqa: SIM905

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_THREAD = 0x10000  # CLONE_THREAD: a thread of this process, never a process of its own
# (argument, how, mask or value, value): a call is allowed where one line of its list holds.
_CONDITIONAL = {
    "clone": [(0, _MASKED_EQUAL, _THREAD, _THREAD)],
    # F_SETOWN would let signals go to other processes, so the harmless commands are named.
    "fcntl": [(1, _EQUAL, command, 0) for command in (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)],
    "ioctl": [(1, _EQUAL, request, 0) for request in (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)],
    "prctl": [(0, _EQUAL, option, 0) for option in (15, 16, 0x53564D41)],  # names of threads and of memory
    "prlimit64": [(0, _EQUAL, 0, 0)],  # itself
}


class _Comparison(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


@lru_cache(maxsize=1)
def program_filter() -> bytes:
    """What a program may call, as the kernel takes it (sock_filter). Raises OSError where libseccomp is missing."""
    return _filter(_ALLOWED, _CONDITIONAL)


@lru_cache(maxsize=1)
def scorer_filter() -> bytes:
    """The same for the process that scores one answer."""
    reading = {"open": [(1, _MASKED_EQUAL, _WRITES, 0)], "openat": [(2, _MASKED_EQUAL, _WRITES, 0)]}
    return _filter(_SCORER, reading | {name: _CONDITIONAL[name] for name in ("fcntl", "ioctl", "prlimit64")})


def _filter(allowed: list[str], conditional: dict[str, list[tuple[int, int, int, int]]]) -> bytes:
    library = ctypes.CDLL("libseccomp.so.2", use_errno=True)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ERRNO | errno.ENOSYS)))
    try:
        _check(library.seccomp_attr_set(context, _ATTRIBUTE_BAD_ARCHITECTURE, ctypes.c_uint32(_KILL_PROCESS)))
        for name in allowed:
            _allow(library, context, name)
        for name, conditions in conditional.items():
            for condition in conditions:
                _allow(library, context, name, _Comparison(*condition))
        with tempfile.TemporaryFile() as file:
            _check(library.seccomp_export_bpf(context, file.fileno()))
            file.seek(0)
            return file.read()
    finally:
        library.seccomp_release(context)


def _allow(library: ctypes.CDLL, context: ctypes.c_void_p, name: str, *conditions: _Comparison) -> None:
    number = library.seccomp_syscall_resolve_name(name.encode())
    if number < 0:
        return  # this architecture does not have it
    array = (_Comparison * len(conditions))(*conditions)
    action = ctypes.c_uint32(_ALLOW)
    _check(library.seccomp_rule_add_array(context, action, number, len(conditions), array))


def _check(result: int) -> None:
    if result < 0:
        raise OSError(-result, f"libseccomp: {os.strerror(-result)}")
