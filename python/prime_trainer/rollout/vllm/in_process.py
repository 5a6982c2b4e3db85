"""Sampling with vLLM in the trainer's process: its tensors go straight into the engine's."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from ...models.loading import NamedTensors, save_config
from ...models.protocols import CausalLM, Tokenizer
from ...run.seeds import derive_seed
from ..sampler import EngineConfig, EngineDied, LogitsDtype, Sample, Sampling, model_shape
from . import engine


class VLLMSampler:
    def __init__(self, cfg: EngineConfig, model: CausalLM, tokenizer: Tokenizer) -> None:
        self.shape = model_shape(model, tokenizer, cfg.rollout.vllm.max_model_len)
        self.limit = self.shape.limit
        self.sleeps = cfg.rollout.vllm.sleep
        self.device = model.device
        self.options = engine.engine_options(cfg.rollout, cfg.model, self.device.type == "cpu", self.shape.limit)
        if self.sleeps and self.device.type != "cpu":  # on CPUs vLLM refuses the option; there sleeping does nothing
            self.options["enable_sleep_mode"] = True
        self.directory = tempfile.TemporaryDirectory(prefix="prime-trainer-")
        save_config(model, self.directory.name)
        self.version = -1
        self._engine: engine.Engine | None = None
        self._usable = self._asleep = False
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    @property
    def logits_dtype(self) -> LogitsDtype:
        return self._live.logits_dtype()

    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        self.shape.check_prompts(prompts, sampling)
        if not self._usable:
            raise EngineDied("the engine holds no complete set of weights")
        self._usable = False  # unless this ends well: what an error leaves behind would come up in the next call
        flat = self._live.generate(
            [prompt for prompt in prompts for _ in range(n)],
            [derive_seed(seed, k) for seed in seeds for k in range(n)],
            sampling,
            self.shape.stops,
            self.version,
        )
        self._usable = True
        return [flat[at : at + n] for at in range(0, len(flat), n)]

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        tensors, live = self.shape.check_weights(named_tensors), self._live
        self._usable = False
        if self._asleep:
            with live.waking():
                live.load(tensors)
            self._asleep = False
        else:
            live.load(tensors)
        self.version, self._usable = version, True

    def release(self) -> None:
        if self.sleeps and not self._asleep:
            self._live.sleep()
            self._asleep, self._usable = True, False

    def restart(self) -> None:
        self._drop()
        self.version = -1
        self._build()

    def close(self) -> None:
        self._drop()
        self.directory.cleanup()

    @property
    def _live(self) -> engine.Engine:
        if self._engine is None:
            raise EngineDied("there is no engine")
        return self._engine

    def _build(self) -> None:
        self._engine = engine.Engine(self.directory.name, self.options, self.device)
        self._asleep = False

    def _drop(self) -> None:
        engine, self._engine, self._usable = self._engine, None, False
        if engine is not None:
            engine.close()
