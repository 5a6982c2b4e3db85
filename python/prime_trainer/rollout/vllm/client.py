"""One vLLM server over HTTP: its health, its weights, its responses."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from ...errors import RunError
from ..sampler import EngineDied, LogitsDtype, Sampling
from .server import MODEL_NAME

CONTROL_SECONDS = 600.0  # draining waits for the longest response
HEALTH_SECONDS = 30.0
HEALTH_TRIES = 3


def unknown() -> None:
    """For a server that this process did not start."""


class Client:
    """`death` returns why the server's process ended, None while it runs or where it is not ours."""

    def __init__(self, url: str, token: str, death: Callable[[], str | None] = unknown) -> None:
        self.url, self.death = url.rstrip("/"), death
        self.headers = {"Authorization": f"Bearer {token}"}
        # Without trust_env: a proxy for the world outside must not stand between us and our own engine.
        self._http = httpx.Client(base_url=self.url, headers=self.headers, timeout=CONTROL_SECONDS, trust_env=False)

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """Raises RunError for what the server refuses, EngineDied for all else that goes wrong."""
        try:
            response = self._http.request(method, path, json=body, **options)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url} does not answer {path}: {self._cause(error)}") from error
        return self._checked(response)

    def wait_ready(self, seconds: float) -> None:
        """Returns when the server answers and takes our token. Raises EngineDied when it ends or time is up."""
        deadline, pause = time.monotonic() + seconds, 0.1
        while not self._healthy():
            if (why := self.death()) is not None:
                raise EngineDied(why)
            if time.monotonic() > deadline:
                raise EngineDied(f"{self.url} did not answer within rollout.server.start_seconds = {seconds:g}")
            time.sleep(pause)
            pause = min(2 * pause, 2.0)
        self.weight_version()

    def weight_version(self) -> str:
        """`default` for a server that has had no update."""
        return self.call("GET", "/weight_info")["weight_version"]

    def logits_dtype(self) -> LogitsDtype:
        found = set(self.call("POST", "/collective_rpc", {"method": "logits_dtype"})["results"])
        return "float32" if found == {"float32"} else "input"

    def update(self, send: Callable[[Client], None], version: int) -> None:
        """Drains running requests, calls `send` for the transfer, and clears the prefix cache of the old weights."""
        self.call("POST", "/pause", params={"mode": "wait"})
        send(self)
        self.call("POST", "/update_weight_version", {"new_version": str(version)})
        if not self.call("POST", "/reset_prefix_cache")["success"]:
            raise EngineDied(f"{self.url}: the prefix cache could not be reset after a weight update")
        self.call("POST", "/resume")

    def close(self) -> None:
        self._http.close()

    # What vLLM's trainer side of a transfer calls.

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.call("POST", "/start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self.call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.call("POST", "/finish_weight_update", {"weight_version": weight_version})

    def connect(self, concurrency: int) -> httpx.AsyncClient:
        """For `sample` and `watch`; no more than `concurrency` requests are under way, the others wait here."""
        limits = httpx.Limits(max_connections=concurrency + 1, max_keepalive_connections=concurrency + 1)
        timeout = httpx.Timeout(None, connect=HEALTH_SECONDS)
        return httpx.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=timeout, limits=limits, trust_env=False
        )

    async def sample(
        self, http: httpx.AsyncClient, prompt: list[int], seed: int, sampling: Sampling, stops: Sequence[int]
    ) -> tuple[list[int], list[float], str | None]:
        """Token ids, log-probs and finish reason of one response."""
        body = {
            "model": MODEL_NAME,
            "prompt": prompt,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
            "logprobs": 0,
            "stop_token_ids": list(stops),
            "return_token_ids": True,
            "skip_special_tokens": False,
        }
        try:
            response = await http.post("/v1/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineDied(f"{self.url} broke off a response: {self._cause(error)}") from error
        choice = self._checked(response)["choices"][0]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], choice["finish_reason"]

    async def watch(self) -> None:
        """Ends with EngineDied when the server does: a request alone would wait for ever on some of its deaths."""
        failures = 0
        timeout = httpx.Timeout(HEALTH_SECONDS)
        async with httpx.AsyncClient(base_url=self.url, timeout=timeout, trust_env=False) as http:
            while True:
                await asyncio.sleep(1.0 + failures)
                if (why := self.death()) is not None:
                    raise EngineDied(why)
                try:
                    healthy = (await http.get("/health")).status_code == 200
                except httpx.HTTPError:
                    healthy = False
                failures = 0 if healthy else failures + 1
                if failures == HEALTH_TRIES:
                    raise EngineDied(f"{self.url} failed {failures} health checks in a row")

    def _healthy(self) -> bool:
        try:
            return self._http.get("/health", timeout=HEALTH_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False

    def _checked(self, response: httpx.Response) -> Any:
        if response.status_code == 401:
            raise RunError(f"{self.url} refuses the token in rollout.server.token_file")
        if response.status_code == 404:
            raise RunError(f"{self.url} has no {response.request.url.path}: is it a server of prime-trainer serve?")
        if response.status_code >= 400:
            try:
                message = response.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = response.text[:500]
            kind = EngineDied if response.status_code >= 500 else RunError
            raise kind(f"{self.url}{response.request.url.path} answered {response.status_code}: {message}")
        return response.json()

    def _cause(self, error: Exception) -> str:
        return self.death() or str(error) or type(error).__name__
