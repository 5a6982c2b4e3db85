"""Scores programs: takes the code out of a response, runs it in a sandbox, and compares what it did out here.

The program's process never holds an expected result: outputs and returned values are plain data that is compared here,
and assertions run in a second sandbox, which calls the program's functions in the first one.
"""

from __future__ import annotations

import json
import math
import os
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from .answers import AssertTests, CallTests, ProgramTests, StdioTests
from .extract import MAX_PROGRAM_CHARS
from .sandbox import (
    Confinement,
    Ended,
    Expired,
    Limits,
    SandboxError,
    Session,
)
from .sandboxed import codec
from .verdict import TIME_LIMIT, Verdict

_START_ATTEMPTS = 3
_MAX_PROGRAMS = 8
_SECONDS_A_TEST = 0.05  # a fork and two messages
_MAX_STRETCH = 8.0
_SPARE = 1 << 16  # bytes that an output may have beyond the expected one's before it is cut off


class CodeRunner:
    """Scores programs, `workers` at once, each in a sandbox of its own; its threads only wait and compare."""

    def __init__(self, confinement: Confinement, limits: Limits, workers: int, partial_credit: bool = False) -> None:
        self._confinement, self._limits, self._partial = confinement, limits, partial_credit
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._live: set[Session] = set()
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, answer: ProgramTests, *programs: str) -> Future[Verdict]:
        """Scores the first of the programs that compiles."""
        return self._pool.submit(self._score, answer, programs)

    def close(self) -> None:
        """Kills the programs that run and forgets those that wait."""
        with self._lock:
            self._closed = True
            for session in self._live:
                session.kill()
        self._pool.shutdown(cancel_futures=True)

    def _score(self, answer: ProgramTests, programs: Sequence[str]) -> Verdict:
        programs = [program for program in programs if len(program) <= MAX_PROGRAM_CHARS][:_MAX_PROGRAMS]
        if not programs:
            return Verdict(0.0, "too long")
        with self._open(_mode(answer)) as session:
            began = time.monotonic()
            session.deadline = began + self._wall_seconds(answer)
            with self._lock:
                if self._closed:
                    return Verdict(0.0, "stopped")
                self._live.add(session)
            try:
                passed, total = _judge(session, answer, programs, self._partial, self._limits.seconds)
            except Expired:
                return Verdict(0.0, TIME_LIMIT)
            except Ended:
                # A process that has used its processor time is killed.
                late = time.monotonic() - began >= self._limits.seconds
                return Verdict(0.0, TIME_LIMIT if late else "the program ended its process")
            except (RecursionError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
                # A reply is whatever the program wants it to be.
                return Verdict(0.0, f"the program's reply: {type(error).__name__}")
            finally:
                with self._lock:
                    self._live.discard(session)
        if self._partial:
            return Verdict(passed / total, None)
        return Verdict(float(passed == total), None)

    def _wall_seconds(self, answer: ProgramTests) -> float:
        """The limit on the clock: that of processor time, and more where others use the processors, too."""
        tests = answer.tests if isinstance(answer, AssertTests) else answer.inputs
        busy = max(os.getloadavg()[0], self._pool._max_workers) / (os.cpu_count() or 1)
        return (self._limits.seconds + _SECONDS_A_TEST * len(tests)) * min(max(1.0, busy), _MAX_STRETCH)

    def _open(self, mode: _Mode) -> Session:
        for attempt in range(_START_ATTEMPTS):
            try:
                return Session(self._confinement, mode, self._limits)
            except (SandboxError, OSError) as error:
                # It worked when it was tried first: a machine that is short of something has it again soon.
                failure = error
                time.sleep(0.5 * (attempt + 1))
        raise SandboxError(f"a sandbox that worked before does not start: {failure}")


_Mode = Literal["run", "calls", "tests"]


def _mode(answer: ProgramTests) -> _Mode:
    if isinstance(answer, StdioTests):
        return "run"
    return "calls" if isinstance(answer, CallTests) else "tests"


def _judge(
    session: Session, answer: ProgramTests, programs: Sequence[str], every: bool, seconds: float
) -> tuple[int, int]:
    """How many tests passed, and of how many; stops at the first that fails unless `every` one is wanted."""
    if isinstance(answer, StdioTests):
        return _judge_runs(session, answer, programs, every, seconds)
    if isinstance(answer, CallTests):
        return _judge_calls(session, answer, programs, every)
    return _judge_asserts(session, answer, programs, every)


def _judge_runs(
    session: Session, answer: StdioTests, programs: Sequence[str], every: bool, seconds: float
) -> tuple[int, int]:
    session.send({"programs": programs})
    passed, total, used = 0, len(answer.inputs), 0.0
    for text, expected in zip(answer.inputs, answer.outputs, strict=True):
        limit = 2 * len(expected.encode()) + _SPARE
        reply = session.ask({"stdin": text, "limit": limit}, 7 * limit + 1024)  # JSON may need six bytes for one
        used += float(reply["seconds"])  # of the processor, as the kernel counted them
        if used > seconds:
            raise Expired
        right = reply.get("status") == 0 and reply.get("over") is False and isinstance(reply.get("stdout"), str)
        if right and same_output(reply["stdout"], expected):
            passed += 1
        elif not every:
            break
    return passed, total


def _judge_calls(session: Session, answer: CallTests, programs: Sequence[str], every: bool) -> tuple[int, int]:
    passed, total = 0, len(answer.inputs)
    if session.ask({"programs": programs, "name": answer.fn_name}, 1 << 12) != {"loaded": True}:
        return 0, total
    for args, expected in zip(answer.inputs, answer.outputs, strict=True):
        wanted = codec.encode(expected)
        cap = 8 * len(json.dumps(wanted)) + _SPARE
        reply = session.ask({"name": answer.fn_name, "args": [codec.encode(_integer_keys(a)) for a in args]}, cap)
        if "value" in reply and same_value(reply["value"], expected):
            passed += 1
        elif not every:
            break
    return passed, total


_INTEGER = re.compile(r"-?[1-9]\d{0,18}|0")


def _integer_keys(value: Any) -> Any:
    """JSON made text of the keys of a dictionary; where all look like integers, that is what they were."""
    if isinstance(value, list):
        return [_integer_keys(v) for v in value]
    if not isinstance(value, dict):
        return value
    whole = bool(value) and all(_INTEGER.fullmatch(key) for key in value)
    return {int(k) if whole else k: _integer_keys(v) for k, v in value.items()}


def _judge_asserts(session: Session, answer: AssertTests, programs: Sequence[str], every: bool) -> tuple[int, int]:
    request = {"setup": answer.setup, "tests": answer.tests, "names": answer.names}
    reply = session.ask(
        {"programs": [_complete(answer, program) for program in programs], "every": every, **request}, 1 << 12
    )
    return reply["passed"], len(answer.tests)  # the tests' own sandbox counted them


def _complete(answer: AssertTests, program: str) -> str:
    """Puts the prompt's code before the program; a bare body continues the prompt's last function."""
    defines = any(re.search(rf"\bdef\s+{re.escape(name)}\b", program) for name in answer.names)
    return f"{answer.prelude}\n\n{program}" if defines else f"{answer.prelude}{program}"


def same_output(got: str, expected: str) -> bool:
    """Whether two outputs have the same words in the same lines.

    Spaces at the ends of lines and empty lines at the end do not count. Where the expected word has a decimal point or
    an exponent, a number within a relative or absolute 1e-6 of it is the same. Where it is an integer, the same digits
    with a fraction of zeros (`2.0` for `2`) are; integers are compared exactly.
    """
    mine, theirs = _words(got), _words(expected)
    return len(mine) == len(theirs) and all(
        len(a) == len(b) and all(x == y or _close(x, y) for x, y in zip(a, b, strict=True))
        for a, b in zip(mine, theirs, strict=True)
    )


def _words(text: str) -> list[list[str]]:
    return [line.split() for line in text.rstrip().split("\n")]


_REAL = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


_WHOLE = re.compile(r"([-+]?\d+)\.0*")


def _close(got: str, expected: str) -> bool:
    whole = _WHOLE.fullmatch(got)
    if whole and (whole[1] == expected or (expected == "0" and whole[1] == "-0")):
        return True
    if len(got) > 400 or not _REAL.fullmatch(expected):
        return False
    try:
        return math.isclose(float(got), float(expected), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False


def same_value(got: Any, expected: Any) -> bool:
    """Whether an encoded returned value is the expected JSON value, or its only element (some files wrap results).

    Tuples are lists, keys are text, and floats may differ by 1e-6 as in `same_output`.
    """
    got = _plain(got)
    wrapped = isinstance(expected, list) and len(expected) == 1
    return _equal(got, expected) or (wrapped and _equal(got, expected[0]))


def _plain(value: Any) -> Any:
    # Not `decode`: it would hash what the program chose, and hashes of numbers can be made to collide.
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    kind, items = value.get("__python__"), value.get("items")
    if kind == "int" and isinstance(items, list) and len(items) == 1 and isinstance(items[0], str):
        return int(items[0], 16)
    if kind is None:
        return {k: _plain(v) for k, v in value.items()}
    if kind in ("tuple", "iterator", "deque") and isinstance(items, list):
        return [_plain(v) for v in items]
    if kind == "dict" and isinstance(items, list) and all(isinstance(i, list) and len(i) == 2 for i in items):
        return {str(k): _plain(v) for k, v in items}
    return _NOTHING


_NOTHING = object()


def _equal(got: Any, expected: Any) -> bool:
    if isinstance(expected, list):
        return isinstance(got, list) and len(got) == len(expected) and all(map(_equal, got, expected))
    if isinstance(expected, dict):
        same_keys = isinstance(got, dict) and got.keys() == expected.keys()
        return same_keys and all(_equal(got[k], v) for k, v in expected.items())
    if isinstance(expected, float) and isinstance(got, (int, float)):
        try:
            return math.isclose(got, expected, rel_tol=1e-6, abs_tol=1e-6)
        except OverflowError:
            return False
    return type(got) in (bool, int, float, str, type(None)) and got == expected
