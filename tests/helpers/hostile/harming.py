"""Programs that use up, destroy or change what is not theirs."""

WRITE = "for p in {places}:\n    try:\n        open(p, 'w').write('x')\n    except OSError:\n        pass\n"

HARMING = {
    "fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "clone bomb": """
import ctypes
libc = ctypes.CDLL(None)
while True:
    libc.syscall(56, 17, 0, 0, 0, 0)
    libc.syscall(57)
""",
    "thread bomb": """
import threading, time
threading.stack_size(65536)
while True:
    try:
        threading.Thread(target=time.sleep, args=(60,)).start()
    except Exception:
        pass
""",
    "process pool": """
import multiprocessing
multiprocessing.Pool(64).map(len, ['x'] * 1000)
""",
    "subprocess": """
import subprocess
subprocess.run(['touch', '{folder}/{marker}'])
subprocess.Popen(['sleep', '1000'])
""",
    "shell": """
import os
os.system('touch {folder}/{marker}; sleep 1000 &')
""",
    "daemon": """
import os, time
try:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
except OSError:
    pass
time.sleep(1000)
""",
    "daemon that ignores signals": """
import os, signal, time
for s in range(1, 65):
    try:
        signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
try:
    os.setsid()
except OSError:
    pass
while True:
    time.sleep(1)
""",
    "memory bomb": """
held = []
while True:
    try:
        held.append(bytearray(b'x') * (1 << 24))
    except MemoryError:
        pass
""",
    "memory bomb of pages": """
import mmap
held = []
while True:
    m = mmap.mmap(-1, 1 << 26)
    for i in range(0, len(m), 4096):
        m[i] = 1
    held.append(m)
""",
    "memory bomb in files of memory": """
import os
held = []
while True:
    try:
        fd = os.memfd_create('x')
        held.append(fd)
        while True:
            os.write(fd, b'x' * (1 << 20))
    except (OSError, AttributeError):
        pass
""",
    "memory bomb of segments": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
while True:
    at = libc.shmat(libc.shmget(0, 1 << 26, 0o1600), None, 0)
    if at not in (None, 2**64 - 1):
        ctypes.memset(at, 1, 1 << 26)
""",
    "a huge number": "print(9 ** 9 ** 9 ** 9)",
    "a huge text": "x = 'x' * (1 << 62)",
    "endless output": """
while True:
    print('x' * 100000)
""",
    "endless errors": """
import sys
while True:
    sys.stderr.write('x' * 100000)
""",
    "endless loop": """
while True:
    pass
""",
    "sleep": """
import time
time.sleep(1000)
""",
    "reading what never comes": """
import os
os.read(os.pipe()[0], 1)
""",
    "uncatchable": """
while True:
    try:
        while True:
            pass
    except BaseException:
        pass
""",
    "a regular expression": """
import re
re.match('(a+)+$', 'a' * 64 + 'b')
""",
    "recursion": """
import sys
sys.setrecursionlimit(10**9)
def f():
    return f()
f()
""",
    "a crash": """
import ctypes
ctypes.string_at(1)
""",
    "disk bomb": """
import os
n = 0
while True:
    for folder in ('/tmp', '/dev/shm', '/var/tmp', '{folder}', '.'):
        try:
            n += 1
            with open(f'{{folder}}/{marker}-{{n}}', 'wb') as file:
                while True:
                    file.write(b'x' * (1 << 20))
        except OSError:
            pass
""",
    "empty files without end": """
import os
n = 0
while True:
    for folder in ('/tmp', '/dev/shm', '/dev', '/var/tmp', '/', '.'):
        try:
            n += 1
            os.close(os.open(f'{{folder}}/{marker}-{{n}}', os.O_CREAT | os.O_WRONLY))
            os.link(f'{{folder}}/{marker}-{{n}}', f'{{folder}}/{marker}-{{n}}-link')
        except OSError:
            pass
""",
    "a sparse file": """
import os
fd = os.open('sparse', os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 1 << 50)
os.posix_fallocate(fd, 0, 1 << 40)
""",
    "directory bomb": """
import os
while True:
    os.mkdir('d')
    os.chdir('d')
""",
    "writing outside": WRITE,
    "writing by a symlink": """
import os
try:
    os.symlink('{folder}', '/tmp/out')
except OSError:
    pass
try:
    open('/tmp/out/{marker}', 'w').write('x')
except OSError:
    pass
""",
    "replacing the shared file": """
import os
for f in (os.remove, os.rmdir, lambda p: os.truncate(p, 0), lambda p: os.chmod(p, 0)):
    for p in ('{folder}/secret.txt', '{folder}'):
        try:
            f(p)
        except OSError:
            pass
""",
    "changing times": """
import os
os.utime('{folder}/secret.txt', (0, 0))
""",
    "mounting": """
import ctypes
libc = ctypes.CDLL(None)
libc.unshare(0x10020000)
libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)
libc.mount(b'proc', b'/tmp', b'proc', 0, None)
libc.chroot(b'/tmp')
open('{folder}/{marker}', 'w').write('x')
""",
    "signals to the trainer": """
import os
for s in (1, 2, 3, 9, 10, 15, 19):
    try:
        os.kill({trainer}, s)
    except OSError:
        pass
""",
    "signals to everybody": """
import os
for p in (-1, 0, os.getppid(), 1, {victim}):
    try:
        os.kill(p, 9)
    except OSError:
        pass
""",
    "a signal by a queue": """
import ctypes
libc = ctypes.CDLL(None)
for pid in ({trainer}, {victim}):
    libc.syscall(129, pid, 10, ctypes.create_string_buffer(128))
    libc.syscall(234, pid, pid, 10)
    libc.syscall(200, pid, 10)
    libc.syscall(424, libc.syscall(434, pid, 0), 10, None, 0)
""",
    "a signal by a descriptor": """
import fcntl, os
r, w = os.pipe()
fcntl.fcntl(r, 8, {trainer})
fcntl.fcntl(r, fcntl.F_SETFL, os.O_ASYNC)
os.write(w, b'x')
""",
    "limits of the trainer": """
import resource
for pid in ({trainer}, {victim}):
    resource.prlimit(pid, resource.RLIMIT_CPU, (1, 1))
""",
    "priorities of others": """
import os
for pid in ({trainer}, {victim}):
    os.setpriority(os.PRIO_PROCESS, pid, 19)
""",
    "processors of others": """
import os
os.sched_setaffinity({victim}, {{0}})
""",
    "the clock and the name": """
import socket, time
try:
    socket.sethostname('hacked')
except OSError:
    pass
time.clock_settime(0, 0)
""",
    "messages to the network": """
import socket
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW):
    for host in ('127.0.0.1', '1.1.1.1'):
        try:
            link = socket.socket(socket.AF_INET, kind)
            link.settimeout(0.2)
            link.connect((host, {port}))
            link.send(b'{marker}')
        except OSError:
            pass
""",
    "listening": """
import socket
s = socket.socket()
s.bind(('0.0.0.0', 0))
s.listen()
""",
    "io_uring and bpf": """
import ctypes
libc = ctypes.CDLL(None)
for n in (425, 321, 298, 323, 250, 248, 175, 246, 169):
    libc.syscall(n, 1, 0, 0, 0, 0)
""",
    "32-bit system calls": """
import ctypes, mmap
code = bytes.fromhex('b814000000cd80c3')  # mov eax, 20; int 0x80; ret
page = mmap.mmap(-1, 4096, prot=7)
page.write(code)
ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()
""",
    "becoming root": """
import os
for f in (os.setuid, os.setgid):
    try:
        f(0)
    except OSError:
        pass
open('{folder}/{marker}', 'w').write('x')
""",
}
