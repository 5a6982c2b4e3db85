"""The process in a sandbox that runs a program (modes `run` and `calls`) or the tests of one (mode `tests`).

It reads one JSON message a line and writes one a line. What it says about a program is the program's own word: the
expected results are never here, they are compared outside (`run`, `calls`) or in another sandbox (`tests`).
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import fcntl
import json
import os
import signal
import sys
import types
from typing import Any

import codec
import confine
import provided

_CHUNK = 1 << 16
_ADD_SEALS, _NO_CHANGE = 1033, 1 | 2 | 4 | 8  # F_ADD_SEALS; F_SEAL_SEAL, _SHRINK, _GROW, _WRITE


class Channel:
    """Lines of JSON over two descriptors."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink, self._held = source, sink, b""

    def receive(self) -> dict[str, Any] | None:
        """The next message; None at the end."""
        parts = [self._held]
        while b"\n" not in parts[-1]:
            parts.append(os.read(self.source, _CHUNK))
            if not parts[-1]:
                return None
        line, _, self._held = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def expect(self) -> dict[str, Any]:
        """The next message, where there must be one."""
        message = self.receive()
        if message is None:
            raise SystemExit(0)  # the trainer has ended
        return message

    def send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self.sink, data) :]


def main() -> None:
    cfg = json.loads(sys.argv[1])
    channel = Channel(os.dup(0), os.dup(1))
    confine.enter(cfg)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    # The interpreter started without `site`; and nothing of this folder can be imported by what runs here.
    builtins.exit = builtins.quit = _sitebuiltins.Quitter("exit", "")
    sys.path[:] = [*sys.path[1:], *cfg["packages"]]
    sys.modules.pop("codec"), sys.modules.pop("confine"), sys.modules.pop("provided")
    sys.set_int_max_str_digits(0)
    if cfg["mode"] == "run":
        program = _serve_runs(channel, cfg)
        if program is not None:
            _run_main(program)
    elif cfg["mode"] == "calls":
        confine.seal(cfg)
        _serve_calls(channel)
    else:
        confine.seal(cfg)
        _run_tests(channel, Channel(*cfg["peer"]))


def _serve_runs(channel: Channel, cfg: dict[str, Any]) -> types.CodeType | None:
    """Runs the program once a request, in a child each. Returns its code in the child, None at the end."""
    channel.send({"ready": True})
    program = _prepare(channel.expect()["programs"], "program.py")
    while (request := channel.receive()) is not None:
        stdin, stdout = _file_with(request["stdin"].encode()), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(stdin, 0)
            os.dup2(stdout[1], 1)
            os.closerange(3, cfg["limits"]["nofile"])
            confine.seal(cfg)
            return program
        os.close(stdin)
        os.close(stdout[1])
        channel.send(_collect(pid, stdout[0], request["limit"]))
    return None


def _prepare(programs: list[str], name: str) -> types.CodeType:
    """The first of the programs that compiles, or one that raises; what it uses without importing is provided.

    What it imports of the provided modules is imported here, once, and not in each of its runs.
    """
    failure: BaseException | None = None
    for program in programs:
        try:
            # The runner's own `from __future__` is not the program's.
            code = compile(program, name, "exec", dont_inherit=True)
        except BaseException as error:
            failure = failure or error
            continue
        provided.provide(program)
        provided.open_standard_input(program)
        return code
    message = f"raise SyntaxError({_describe(failure or SyntaxError())!r})"
    return compile(message, name, "exec", dont_inherit=True)


def _file_with(text: bytes) -> int:
    """A file in memory that holds the text and cannot be changed: programs ask for the size of standard input."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    left = memoryview(text)
    while left:
        left = left[os.write(fd, left) :]
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, _ADD_SEALS, _NO_CHANGE)
    return fd


def _collect(pid: int, source: int, limit: int) -> dict[str, Any]:
    """Reads what a child writes until it ends, or `limit` bytes are there: the rest cannot matter."""
    output = bytearray()
    while len(output) <= limit and (chunk := os.read(source, _CHUNK)):
        output += chunk
    os.close(source)
    over = len(output) > limit
    if over:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    return {
        "stdout": output[:limit].decode(errors="replace"), "status": os.waitstatus_to_exitcode(status), "over": over,
        "seconds": used.ru_utime + used.ru_stime,
    }  # fmt: skip


def _run_main(program: types.CodeType) -> None:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(program, module.__dict__)


def _serve_calls(channel: Channel) -> None:
    """Loads the program as a module and calls its functions, or the methods of its class Solution, by name."""
    channel.send({"ready": True})
    program = _prepare(channel.expect()["programs"], "program.py")
    module = types.ModuleType("program")
    module.__dict__["__builtins__"] = builtins
    sys.modules["program"] = module
    sys.argv = ["program.py"]
    try:
        exec(program, module.__dict__)
        channel.send({"loaded": True})
    except BaseException as error:
        channel.send({"error": _describe(error)})
        return
    while (request := channel.receive()) is not None:
        try:
            function = _find(module, request["name"])
            value = function(*map(codec.decode, request["args"]))
            try:
                reply = {"value": codec.encode(value)}
            except TypeError:
                reply = {"opaque": bool(value)}  # a match object, say: tests may ask whether it is there
        except BaseException as error:
            reply = {"error": _describe(error)}
        channel.send(reply)


def _find(module: types.ModuleType, name: str) -> Any:
    if hasattr(module, name) or not hasattr(module, "Solution"):
        return getattr(module, name)
    return getattr(module.Solution(), name)


class Opaque:
    """A result that is no plain data. It is true or false, and equal to nothing else."""

    def __init__(self, truth: bool) -> None:
        self._truth = truth

    def __bool__(self) -> bool:
        return self._truth


class CallFailed(Exception):
    """A call of the program raised. Always this one type: a StopIteration, say, could end a test's loop early."""


def _run_tests(channel: Channel, peer: Channel) -> None:
    """Runs trusted test code whose calls of the program go to another sandbox, and says how many tests passed."""
    if peer.receive() != {"ready": True}:
        return
    channel.send({"ready": True})
    request = channel.expect()
    peer.send({"programs": request["programs"]})
    loaded = peer.receive()
    passed = 0
    if loaded == {"loaded": True}:
        namespace: dict[str, Any] = {"__name__": "tests"}
        exec(request["setup"], namespace)
        namespace |= {name: _proxy(peer, name) for name in request["names"]}
        for test in request["tests"]:
            try:
                exec(test, namespace)
                passed += 1
            except (Exception, SystemExit):
                if not request["every"]:
                    break
    channel.send({"passed": passed})


def _proxy(peer: Channel, name: str) -> Any:
    def call(*args: Any) -> Any:
        peer.send({"name": name, "args": [codec.encode(a) for a in args]})
        reply = peer.receive()
        if isinstance(reply, dict) and "opaque" in reply:
            return Opaque(reply["opaque"] is True)
        if not isinstance(reply, dict) or "value" not in reply:
            raise CallFailed(reply)
        return codec.decode(reply["value"])

    return call


def _describe(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"[:500]
    except BaseException:
        return "an error that cannot be shown"


if __name__ == "__main__":
    main()
