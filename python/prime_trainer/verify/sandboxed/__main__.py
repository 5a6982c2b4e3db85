"""The process in a sandbox that runs a program (modes `run` and `calls`) or the tests of one (mode `tests`).

It reads one JSON message a line and writes one a line. What it says about a program is the program's own word: the
expected results are never here, they are compared outside (`run`, `calls`) or in another sandbox (`tests`).
"""

from __future__ import annotations

import _sitebuiltins
import builtins
import json
import os
import selectors
import signal
import sys
import types
from typing import Any

import codec
import confine

_CHUNK = 1 << 16


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
    sys.modules.pop("codec"), sys.modules.pop("confine")
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


def _serve_runs(channel: Channel, cfg: dict[str, Any]) -> str | None:
    """Runs the program once a request, in a child each. Returns its source in the child, None at the end."""
    channel.send({"ready": True})
    program = channel.receive()["program"]
    while (request := channel.receive()) is not None:
        stdin, stdout = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            os.dup2(stdin[0], 0)
            os.dup2(stdout[1], 1)
            os.closerange(3, cfg["limits"]["nofile"])
            confine.seal(cfg)
            return program
        os.close(stdin[0]), os.close(stdout[1])
        channel.send(_converse(pid, stdin[1], stdout[0], request["stdin"].encode(), request["limit"]))
    return None


def _converse(pid: int, sink: int, source: int, text: bytes, limit: int) -> dict[str, Any]:
    """Feeds a child and reads what it writes until it ends, or `limit` bytes are there: the rest cannot matter."""
    os.set_blocking(sink, False)
    left, output = memoryview(text), bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(sink, selectors.EVENT_WRITE)
        open_sink, reading = True, True
        while reading:
            for key, _ in selector.select():
                if key.fd == source:
                    chunk = os.read(source, _CHUNK)
                    output += chunk
                    reading = bool(chunk) and len(output) <= limit
                    continue
                try:
                    left = left[os.write(sink, left) :] if left else left
                except BrokenPipeError:
                    left = memoryview(b"")
                if not left and open_sink:
                    selector.unregister(sink)
                    os.close(sink)
                    open_sink = False
    if open_sink:
        os.close(sink)
    os.close(source)
    over = len(output) > limit
    if over:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"stdout": output[:limit].decode(errors="replace"), "status": status, "over": over}


def _run_main(program: str) -> None:
    module = types.ModuleType("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    exec(compile(program, "program.py", "exec"), module.__dict__)


def _serve_calls(channel: Channel) -> None:
    """Loads the program as a module and calls its functions, or the methods of its class Solution, by name."""
    channel.send({"ready": True})
    program = channel.receive()["program"]
    module = types.ModuleType("program")
    module.__dict__["__builtins__"] = builtins
    sys.modules["program"] = module
    sys.argv = ["program.py"]
    try:
        exec(compile(program, "program.py", "exec"), module.__dict__)
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
    request = channel.receive()
    peer.send({"program": request["program"]})
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
