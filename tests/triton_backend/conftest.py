"""Triton decides on interpretation when it decorates a kernel, so what is interpreted has a process of its own."""

import os

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# This process compiles, the other one interprets: neither can do what the other does.
collect_ignore = ["test_compiled.py", "test_interpreted.py"] if INTERPRETED else ["interpreted"]
