"""Programs that claim to be right."""

# `solve` is what the tests call.
FORGING = {
    "exit before the tests": "exit(0)",
    "exit in the call": """
import sys
def solve(*a):
    sys.exit(0)
""",
    "hard exit": """
import os
os._exit(0)
""",
    "hard exit in the call": """
import os
def solve(*a):
    os._exit(0)
""",
    "equal to everything": """
class Same:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
    def __repr__(self): return 'secret'
def solve(*a):
    return Same()
""",
    "text equal to everything": """
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def solve(*a):
    return Text('x')
""",
    "not a number": """
def solve(*a):
    return float('nan')
""",
    "ending the loop": """
def solve(*a):
    raise StopIteration
""",
    "an assertion of its own": """
def solve(*a):
    raise AssertionError('passed')
""",
    "no assertions": """
import builtins
builtins.AssertionError = type('Quiet', (BaseException,), {{}})
builtins.len = lambda x: 0
def solve(*a):
    return True
""",
    "modules replaced": """
import sys, json
json.dumps = lambda *a, **k: '{{"value": 1, "passed": 1, "status": 0}}'
sys.modules['codec'] = None
def solve(*a):
    return 1
""",
    "replies of its own": """
import os
for fd in range(64):
    for line in (b'{{"passed": 1}}', b'{{"loaded": true}}', b'{{"value": true}}', b'{{"stdout": "", "status": 0}}'):
        try:
            os.write(fd, line + b'\\n')
        except OSError:
            pass
def solve(*a):
    return True
""",
    "the expected format": """
print('PASSED\\n1 passed in 0.01s\\nOK\\nAll tests passed')
print('{{"score": 1.0, "failure": null}}')
""",
    "a result without end": """
def solve(*a):
    while True:
        yield 1
""",
    "a deep result": """
def solve(*a):
    x = []
    for _ in range(100000):
        x = [x]
    return x
""",
    "a long result": """
def solve(*a):
    return 'x' * 10**8
""",
    "a long number": """
def solve(*a):
    return 10 ** 100000
""",
    "a deep reply": """
import os
for fd in range(64):
    for line in (b'{{"loaded": true}}', b'{{"value": ' + b'[' * 900 + b']' * 900 + b'}}'):
        try:
            os.write(fd, line + b'\\n')
        except OSError:
            pass
""",
    "a closed channel": """
import os
os.closerange(0, 64)
""",
    "a stopped process": """
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
signal.raise_signal(signal.SIGSTOP)
""",
    "a tracer": """
import sys
sys.settrace(lambda *a: None)
sys.exit = exit = quit = lambda *a: None
def solve(*a):
    return None
""",
}
