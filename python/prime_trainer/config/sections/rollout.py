"""Sampling, and which groups are kept."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from .base import Section


def vllm_installed() -> bool:
    """By the module: the distribution has different names for GPUs and CPUs. A mere folder of that name has no file."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


class VLLMConfig(Section):
    """How an engine is built: in process, or in the servers that `rl` or `serve` start."""

    max_model_len: PositiveInt | None = None
    """Tokens of prompt and response together; unset: what the model's positions allow."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for keys and values; unset: 1 GiB on a CPU, what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0.0, le=1.0)
    """Share of a GPU that the engine takes, weights included; in process the trainer needs the rest."""
    block_size: PositiveInt | None = None
    """Tokens of a block of keys and values, the unit in which prompts are shared; unset: 32 on a CPU, else vLLM's."""
    eager: bool | None = None
    """No compilation and no CUDA graphs; unset: eager on a CPU, where compiling takes a minute at each start."""
    sleep: bool = False
    """Free the GPU's memory while the trainer updates (in process, one GPU shared with the trainer)."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one server."""
    restarts: int = Field(default=1, ge=0)
    """Dead engines that a run replaces; the next one ends it with a checkpoint."""


class ServerConfig(Section):
    """Engines in separate processes, for `rollout.engine = "vllm-server"` and the command `serve`."""

    urls: list[str] = Field(default_factory=list)
    """Servers that `prime-trainer serve` started; prompts are dealt out in turn. None: the run starts one here."""
    host: str = "127.0.0.1"
    """Where `serve` listens. Its traffic is not encrypted: another address is for a trusted network."""
    port: int = Field(default=8000, ge=1, le=65535)
    token_file: Path = Path("runs/server.token")
    """The secret that every request must carry; `serve` makes the file where there is none."""
    transfer: Literal["file", "nccl", "ipc"] = "file"
    """How weights get there: a file in shared memory on this host, or vLLM's own ways between GPUs."""
    start_seconds: float = Field(default=300.0, gt=0)
    """How long a server may take until it answers."""

    @model_validator(mode="after")
    def _addresses(self) -> ServerConfig:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.server.urls must be like http://127.0.0.1:8000, got {url!r}")
        return self


Correction = Literal["token_truncate", "token_mask", "sequence_mask", "off"]


class RolloutConfig(Section):
    engine: Literal["auto", "transformers", "vllm", "vllm-server"] = "auto"
    """`auto`: vLLM in this process where it is installed, else transformers; under torchrun transformers, because a
    default cannot know where a vLLM server should run."""
    prompts_per_step: PositiveInt = 256
    n: PositiveInt = 4
    """Responses a prompt."""
    max_new_tokens: PositiveInt = 3072
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = 1.0
    top_k: int = 0
    """Off, as training needs: log-probs of a cut-off distribution are biased. Other values are refused."""
    batch_size: PositiveInt = 64
    """Sequences decoded side by side, in one server where there are several."""
    lag: Literal[0, 1] = 0
    """1: the next batch is sampled while this one trains, with weights one update older. Needs a vLLM engine."""
    tis: Correction = "token_truncate"
    """Importance weights in the policy loss, with r = pi_trainer / pi_rollout of a token and C = `tis_cap`: min(r, C);
    r, or 0 where it is above C (`token_mask`); the product of a response's r, or 0 where that is above C
    (`sequence_mask`); none (`off`, whatever the cap)."""
    tis_cap: float | None = Field(default=None, ge=0)
    """C of `tis`; 0 is none with `token_truncate`. Unset: 2, but 0 with `token_truncate` and transformers, whose
    log-probs differ from the trainer's by rounding alone."""
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _uncut(self) -> RolloutConfig:
        for key, off in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, key) != off:
                raise ValueError(
                    f"rollout.{key} must be off ({off}) for training, got {getattr(self, key)}: log-probs of a cut-off "
                    "distribution bias the update and nothing here corrects that; use rollout.temperature"
                )
        return self

    @model_validator(mode="after")
    def _masks_beyond_a_cap(self) -> RolloutConfig:
        if self.tis.endswith("_mask") and self.tis_cap == 0:
            raise ValueError(f"rollout.tis_cap must be above 0 with rollout.tis = {self.tis!r}, got 0: all is masked")
        return self

    @property
    def cap(self) -> float:
        """`tis_cap` with its default resolved; 0 for no correction."""
        if self.tis == "off":
            return 0.0
        if self.tis_cap is not None:
            return self.tis_cap
        return 0.0 if self.engine == "transformers" and self.tis == "token_truncate" else 2.0

    def resolved(self) -> RolloutConfig:
        """With the engine that `auto` stands for and the cap that goes with it. Raises ValueError where they clash."""
        engine = self.engine
        if engine == "auto":
            engine = "vllm" if vllm_installed() and "WORLD_SIZE" not in os.environ else "transformers"
        cap = self.model_copy(update={"engine": engine}).cap
        if self.lag and (engine == "transformers" or cap == 0):
            raise ValueError(
                "rollout.lag = 1 needs an engine with weights of its own (rollout.engine vllm or vllm-server) and "
                f"importance weights (rollout.tis_cap above 0, rollout.tis not off), got {engine!r} and {cap}"
            )
        if self.lag and self.vllm.sleep:
            raise ValueError("rollout.vllm.sleep frees the engine while the trainer updates; rollout.lag must be 0")
        return self.model_copy(update={"engine": engine, "tis_cap": cap})


class FilterConfig(Section):
    low: float = Field(default=0.2, ge=0.0, le=1.0)
    high: float = Field(default=0.8, ge=0.0, le=1.0)
    """Groups whose mean accuracy is in [low, high] are kept."""
    drop_truncated: bool = False
    max_rounds: PositiveInt = 4
    """Sampling rounds a step may take to fill its batch; after that it trains on the groups that passed."""

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.low > self.high:
            raise ValueError(f"filter.low must not exceed filter.high, got {self.low} > {self.high}")
        return self
