"""Sampling with vLLM servers: prompts are dealt out in turn, weights go to all of them."""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from ...models.loading import NamedTensors, save_config
from ...models.protocols import CausalLM, Tokenizer
from ...run.seeds import derive_seed
from ..sampler import EngineConfig, EngineDied, LogitsDtype, Sample, Sampling, model_shape
from . import engine
from .client import Client
from .server import ServerProcess, free_port, read_token
from .shared_file import SharedFile


class ServerSampler:
    """Servers at `rollout.server.urls`; without any, starts one, whose log is in the run's directory."""

    def __init__(self, cfg: EngineConfig, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.cfg = cfg
        self.shape = model_shape(model, tokenizer, cfg.rollout.vllm.max_model_len)
        self.limit = self.shape.limit
        self.version = -1
        self.directory = tempfile.TemporaryDirectory(prefix="prime-trainer-")
        self.process: ServerProcess | None = None
        self.clients: list[Client] = []
        self._usable = False
        self._unfinished: int | None = None  # the version of an update that failed: some servers may hold a mix
        self._gpu_transfers: list[Callable[[Mapping[str, Tensor]], None]] | None = None
        try:
            if not cfg.rollout.server.urls:
                save_config(model, self.directory.name)
                tokenizer.save_pretrained(self.directory.name)
            self._connect()
        except BaseException:
            self.close()
            raise

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        self.shape.check_prompts(prompts, sampling)
        if not self._usable:
            raise EngineDied("the server holds no complete set of weights")
        for client in self.clients:
            if (found := client.weight_version()) != str(self.version):
                raise EngineDied(f"{client.url} holds the weights {found!r} and not those of version {self.version}")
        jobs = [(i, prompt, derive_seed(seeds[i], k)) for i, prompt in enumerate(prompts) for k in range(n)]
        flat = asyncio.run(self._sample(jobs, sampling))
        return [flat[at : at + n] for at in range(0, len(flat), n)]

    @property
    def logits_dtype(self) -> LogitsDtype:
        found: dict[str, LogitsDtype] = {client.url: client.logits_dtype() for client in self.clients}
        if len(set(found.values())) > 1:
            raise ValueError(
                f"rollout.server.urls: their servers must have the same logits, got {found}; start all with the same "
                "model.logits_dtype"
            )
        return found[self.clients[0].url]

    async def _sample(self, jobs: Sequence[tuple[int, list[int], int]], sampling: Sampling) -> list[Sample]:
        async with AsyncExitStack() as stack:
            concurrency = self.cfg.rollout.batch_size
            https = [await stack.enter_async_context(client.connect(concurrency)) for client in self.clients]

            async def one(prompt_index: int, prompt: list[int], seed: int) -> Sample:
                # A prompt's responses go to one server, which reads it once.
                at = prompt_index % len(self.clients)
                return engine.finished(
                    *await self.clients[at].sample(https[at], prompt, seed, sampling, self.shape.stops), self.version
                )

            samples = asyncio.gather(*(one(*job) for job in jobs))
            watches = [asyncio.create_task(client.watch()) for client in self.clients]
            tasks: list[asyncio.Future[Any]] = [samples, *watches]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for watch in watches:
                    if watch.done():
                        watch.result()  # raises
                return await samples
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        tensors = self.shape.check_weights(named_tensors)
        self._usable, self._unfinished = False, version
        if self.cfg.rollout.server.transfer == "file":
            with SharedFile(tensors) as path:
                self._update_all([lambda client: _send_file(client, path)] * len(self.clients), version)
        else:
            if self._gpu_transfers is None:
                self._gpu_transfers = [self._gpu_transfer(client) for client in self.clients]
            self._update_all([_sending(send, tensors) for send in self._gpu_transfers], version)
        self.version, self._usable, self._unfinished = version, True, None

    def _update_all(self, sends: Sequence[Callable[[Client], None]], version: int) -> None:
        with ThreadPoolExecutor(len(self.clients)) as pool:
            updates = [pool.submit(c.update, send, version) for c, send in zip(self.clients, sends, strict=True)]
        for update in updates:
            update.result()

    def _gpu_transfer(self, client: Client) -> Callable[[Mapping[str, Tensor]], None]:
        world = client.call("GET", "/get_world_size")["world_size"]
        host = _address_towards(client.url)
        return engine.gpu_transfer(self.cfg.rollout.server.transfer, client, host, free_port(), world)

    def release(self) -> None:
        pass

    def restart(self) -> None:
        """Restarts our own server; waits for external ones, which after a failed update must have been restarted."""
        self.version, self._usable, self._gpu_transfers = -1, False, None
        self._disconnect()
        self._connect()
        if self.cfg.rollout.server.urls and self._unfinished is not None:
            for client in self.clients:
                if client.weight_version() not in ("default", str(self._unfinished)):
                    raise EngineDied(f"{client.url} failed an update and its weights are a mix: start it again")

    def close(self) -> None:
        self._usable = False
        self._disconnect()
        self.directory.cleanup()

    def _connect(self) -> None:
        settings = self.cfg.rollout.server
        if settings.urls:
            token = read_token(settings.token_file)
            self.clients = [Client(url, token) for url in settings.urls]
        else:
            token, log = secrets.token_urlsafe(32), self.cfg.output / "server.log"
            print(f"starting a vLLM server; its log is {log}", file=sys.stderr, flush=True)
            self.process = ServerProcess(self.cfg.rollout, self.cfg.model, self.directory.name, token, log)
            self.clients = [Client(self.process.url, token, self.process.death)]
        for client in self.clients:
            client.wait_ready(settings.start_seconds)

    def _disconnect(self) -> None:
        for client in self.clients:
            client.close()
        self.clients = []
        process, self.process = self.process, None
        if process is not None:
            process.close()


def _sending(send: Callable[[Mapping[str, Tensor]], None], tensors: Mapping[str, Tensor]) -> Callable[[Client], None]:
    """For `Client.update`; the transfer has its client already."""
    return lambda _client: send(tensors)


def _send_file(client: Client, path: str) -> None:
    client.start_weight_update()
    client.update_weights({"path": path})
    client.finish_weight_update()


def _address_towards(url: str) -> str:
    """This machine's address as the server sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing
        return probe.getsockname()[0]
