"""Programs that look for the secret, and what they share."""

# How a program that looks for the secret hands it in, in each form of test.
HAND_IN = """
def solve(*args):
    return found
print(found)
"""

LOOKING = {
    "environment": """
import os
found = os.environ.get('PRIME_SECRET', '')
""",
    "environment of the parent": """
import os
found = read(f'/proc/{{os.getppid()}}/environ')
""",
    "environment of the trainer": "found = read('/proc/{trainer}/environ') + read('/proc/{victim}/environ')",
    "environment of init": "found = read('/proc/1/environ') + read('/proc/self/environ')",
    "command lines": """
import glob
found = ''.join(read(p) for p in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/environ'))
""",
    "memory of the trainer": "found = scan('/proc/{trainer}/mem', '/proc/{trainer}/maps')",
    "its own memory": "found = scan('/proc/self/mem', '/proc/self/maps')",
    "memory of its parent": """
import os
found = scan(f'/proc/{{os.getppid()}}/mem', f'/proc/{{os.getppid()}}/maps')
""",
    "a file of everybody": "found = read('{folder}/secret.txt')",
    "a file by a symlink": """
import os
try:
    os.symlink('{folder}/secret.txt', '/tmp/link')
except OSError:
    pass
found = read('/tmp/link')
""",
    "a file by a hard link": """
import os
try:
    os.link('{folder}/secret.txt', '/tmp/hard')
except OSError:
    pass
found = read('/tmp/hard')
""",
    "a file through its root": """
found = read('/proc/1/root{folder}/secret.txt') + read('/proc/{trainer}/root{folder}/secret.txt')
""",
    "a file through dots": "found = read('/tmp/' + '../' * 40 + '{folder}/secret.txt')",
    "a file through the old root": "found = read('/oldroot{folder}/secret.txt') + read('/newroot{folder}/secret.txt')",
    "files of the home directory": """
import os
found = ''.join(read(os.path.join('{home}', n)) for n in ('.prime-secret', '.bash_history', '.ssh/id_rsa'))
""",
    "a file by its handle": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
handle = ctypes.create_string_buffer(b'\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02\\0\\0\\0\\0\\0\\0\\0', 136)
fd = libc.open_by_handle_at(libc.open(b'/', 0), handle, 0)
found = read(f'/proc/self/fd/{{fd}}{folder}/secret.txt')
""",
    "descriptors it was left": """
import os, select
found = ''
for fd in range(64):
    try:
        if select.select([fd], [], [], 0)[0]:
            found += os.read(fd, 100000).decode(errors='replace')
    except Exception:
        pass
""",
    "frames of its callers": """
import sys
frame, found = sys._getframe(), ''
while frame:
    found += repr(frame.f_locals) + repr(frame.f_globals)
    frame = frame.f_back
""",
    "objects of the interpreter": """
import gc
found = ''
for item in gc.get_objects():
    try:
        found += repr(item)[:10000] if isinstance(item, (dict, list, tuple)) else ''
    except Exception:
        pass
""",
    "another program's files": """
import os
found = ''
for folder, _, names in os.walk('/tmp'):
    for name in names:
        found += read(os.path.join(folder, name))
""",
    "shared memory": """
import ctypes
libc = ctypes.CDLL(None)
found = ''
for key in range(64):
    at = libc.shmat(key, None, 0o10000)
    found += '' if at in (-1, None) else str(at)
""",
    "the answer over the network": """
import socket
found = ''
try:
    with socket.create_connection(('127.0.0.1', {port}), 1) as link:
        found = link.recv(1000).decode()
except OSError:
    pass
""",
    "the answer over a socket file": """
import socket
found = ''
try:
    link = socket.socket(socket.AF_UNIX)
    link.connect('{folder}/socket')
    found = link.recv(1000).decode()
except OSError:
    pass
""",
    "the answer over an abstract socket": """
import socket
found = ''
try:
    link = socket.socket(socket.AF_UNIX)
    link.connect('\\0prime-{marker}')
    found = link.recv(1000).decode()
except OSError:
    pass
""",
    "tracing the trainer": """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
attached = libc.ptrace(16, {trainer}, None, None)
found = scan('/proc/{trainer}/mem', '/proc/{trainer}/maps') if attached == 0 else ''
""",
    "memory of a process by its number": """
import ctypes
class Vector(ctypes.Structure):
    _fields_ = [('at', ctypes.c_void_p), ('size', ctypes.c_size_t)]
libc, block = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(4096)
found = ''
for page in range(0x400000, 0x500000, 4096):
    local, remote = Vector(ctypes.addressof(block), 4096), Vector(page, 4096)
    if libc.process_vm_readv({trainer}, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0) > 0:
        found += block.raw.decode(errors='replace')
""",
}

HELPERS = """
import re as _re
def read(path):
    try:
        with open(path, 'rb') as file:
            return file.read(1 << 20).decode(errors='replace')
    except Exception:
        return ''
def scan(mem, maps):
    out = ''
    try:
        with open(maps) as regions, open(mem, 'rb', 0) as memory:
            for line in regions:
                m = _re.match(r'([0-9a-f]+)-([0-9a-f]+) rw', line)
                if m:
                    memory.seek(int(m[1], 16))
                    data = memory.read(min(int(m[2], 16) - int(m[1], 16), 1 << 22))
                    out += ''.join(x.decode() for x in _re.findall(rb'secret-[0-9a-f]{{32}}', data))
    except Exception:
        pass
    return out
"""

CHOOSE = """
_m = _re.search(r'secret-[0-9a-f]{{32}}', found)
found = _m[0] if _m else ''
"""
