"""Triton decides on interpretation when it decorates a kernel, so what is interpreted has a process of its own."""

import os
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# This process compiles, the other one interprets: neither can do what the other does.
COMPILED = ["test_specialised.py", "test_interpreted.py"]
collect_ignore = COMPILED if INTERPRETED else ["interpreted"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiled anew, whatever lies in the user's cache."""
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before
