"""The only file that imports vLLM: the engine in this process, and what its workers and the trainer need for weights.

Measured with vLLM 0.32 on CPUs. What runs on GPUs alone (sleep, nccl, ipc) follows vLLM's documentation and has not
been run.
"""

from __future__ import annotations

import functools
import gc
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from prime_kernels.integrations import head_logits

from ...config.sections import ModelConfig, RolloutConfig
from ...models.adapters.views import unmerged
from ..sampler import EngineDied, LogitsDtype, Sample, Sampling

FILE_BACKEND = "file"
_ENDED: dict[str, Literal["stop", "length"]] = {"stop": "stop", "length": "length"}
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def engine_options(cfg: RolloutConfig, model: ModelConfig, on_cpu: bool, limit: int | None) -> dict[str, Any]:
    """vLLM's engine arguments, the same in process and in a server.

    `processed_logprobs` are those of the distribution that was sampled from, after the temperature; without
    `generation_config = "vllm"` the model's own file would set top_p and the like behind our back.
    `head_dtype` asks for float32 logits, of the same weights; vLLM before 0.26 takes no notice, as `logits_dtype`
    tells.
    On CPUs a prompt is read in one go: of one read in part vLLM drops what it sampled and turns the random stream of
    its request back, which a stream of a CPU cannot do. Many prompts at once, or a full cache, are enough for that.
    """
    v = cfg.vllm
    options = {
        "dtype": model.dtype,
        "hf_overrides": None if model.logits_dtype == "input" else {"head_dtype": "float32"},
        "seed": 0,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "max_num_seqs": cfg.batch_size,
        "max_model_len": limit,
        "enforce_eager": on_cpu if v.eager is None else v.eager,
        "enable_chunked_prefill": False if on_cpu else None,
        "block_size": v.block_size or (32 if on_cpu else None),
        "kv_cache_memory_bytes": int((v.kv_cache_gib or 1.0) * 2**30) if on_cpu or v.kv_cache_gib else None,
        "gpu_memory_utilization": None if on_cpu else v.gpu_memory_utilization,
    }
    return {key: value for key, value in options.items() if value is not None}


def logits_dtype(worker: Any) -> LogitsDtype:
    """What the log-probs of a worker's samples come from, as its model is built."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = [module for module in worker.get_model().modules() if isinstance(module, LogitsProcessor)]
    # Without the attribute logits are in the model's dtype.
    dtypes = {getattr(module, "head_dtype", None) or worker.model_config.dtype for module in found}
    return "float32" if dtypes == {torch.float32} else "input"


class Engine:
    """vLLM in this process. Weights are random until the first `load`.

    Raises EngineDied where vLLM cannot build it, with vLLM's reason.
    """

    def __init__(self, directory: str, options: Mapping[str, Any], device: torch.device) -> None:
        self._device = device
        for key, value in QUIET.items():
            os.environ.setdefault(key, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when the engine is built
        with undisturbed(device):
            from vllm import LLM

            register_head()
            try:
                self._llm = LLM(directory, load_format="dummy", skip_tokenizer_init=True, **options)
            except Exception as error:
                _forget_groups()
                raise EngineDied(f"vLLM cannot build its engine (keys rollout.vllm.*): {error}") from error

    def logits_dtype(self) -> LogitsDtype:
        (found,) = self._llm.collective_rpc(logits_dtype)
        return found

    def generate(
        self, prompts: Sequence[list[int]], seeds: Sequence[int], sampling: Sampling, stops: Sequence[int], version: int
    ) -> list[Sample]:
        """One response a prompt. Any error leaves requests behind, so it is the engine's end: EngineDied."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                seed=seed,
                logprobs=0,
                stop_token_ids=list(stops),
                detokenize=False,
            )
            for seed in seeds
        ]
        with undisturbed(self._device):
            try:
                outputs = self._llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            except Exception as error:
                raise EngineDied(f"vLLM failed while sampling: {type(error).__name__}: {error}") from error
        samples = []
        for output in outputs:
            (one,) = output.outputs
            ids = list(one.token_ids)
            logprobs = [entry[i].logprob for i, entry in zip(ids, one.logprobs, strict=True)]
            samples.append(finished(ids, logprobs, one.finish_reason, version))
        return samples

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The trainer's tensors as they are: no copy between processes. Raises EngineDied: half of them may be in."""
        with undisturbed(self._device):
            try:
                self._llm.collective_rpc(_load_into_worker, args=(tensors,))
            except Exception as error:
                raise EngineDied(f"a weight update failed: {type(error).__name__}: {error}") from error
            if not self._llm.reset_prefix_cache():
                raise EngineDied("the prefix cache could not be reset after a weight update: requests are running")

    def sleep(self) -> None:
        self._llm.sleep(level=2)  # weights are not kept: a full set follows

    @contextmanager
    def waking(self) -> Iterator[None]:
        """Weights come back first, then, once they are new, the memory for keys and values."""
        self._llm.wake_up(tags=["weights"])
        yield
        self._llm.wake_up(tags=["kv_cache"])

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        _forget_groups()


def finished(ids: list[int], logprobs: list[float], reason: str | None, version: int) -> Sample:
    """A response that vLLM aborted is cut off at a place that the policy did not choose."""
    ended = _ENDED.get(reason or "")
    if ended is None:
        raise EngineDied(f"vLLM ended a response after {len(ids)} tokens with the reason {reason!r}")
    return Sample(ids, logprobs, ended, version)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """vLLM seeds and draws from this process's random streams, and on CPUs makes torch.set_num_threads a no-op."""
    import numpy

    numbers, arrays = random.getstate(), numpy.random.get_state()
    threads, setter = torch.get_num_threads(), torch.set_num_threads
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(numbers)
        numpy.random.set_state(arrays)
        torch.set_num_threads = setter
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def _forget_groups() -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    gc.collect()
    cleanup_dist_env_and_memory()


def _load_into_worker(worker: Any, tensors: Mapping[str, Tensor]) -> None:
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(worker.vllm_config):
        load_weights(worker.get_model(), worker.model_config, tensors)


@torch.no_grad()
def load_weights(model: Any, model_config: Any, tensors: Mapping[str, Tensor]) -> None:
    """A full set of checkpoint weights into a live vLLM model, through its layerwise reload.

    Raises ValueError where vLLM took some of its parameters from nowhere; by itself it only warns.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    wanted = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    loaded = model.load_weights(iter(tensors.items()))
    finalize_layerwise_reload(model, model_config)
    if model_config.quantization is None and loaded is not None and wanted - loaded:
        raise ValueError(f"{len(wanted - loaded)} weights of the engine were not given: {sorted(wanted - loaded)[:3]}")
    for module in model.modules():
        # On CPUs a head that is tied to the embedding holds a packed copy, which the reload leaves as it was.
        if isinstance(module, ParallelLMHead) and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)


@functools.cache
def register_head() -> None:
    """Float32 logits on CPUs by our own kernels: there vLLM's way is to convert all weights of the head in every step.

    To be called before a model is built. Nothing changes on GPUs, nor where logits are rounded.
    """
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    if not hasattr(LogitsProcessor, "_apply_head"):  # vLLM before 0.26, which has no float32 head
        return

    @LogitsProcessor.register_oot
    class Float32Logits(LogitsProcessor):
        def _apply_head(self, lm_head: Any, hidden_states: Tensor, embedding_bias: Tensor | None) -> Tensor:
            weight = lm_head.weight
            unrounded = self.head_dtype == torch.float32 != hidden_states.dtype == weight.dtype
            if unrounded and hidden_states.device.type == weight.device.type == "cpu":
                return head_logits(hidden_states, weight, embedding_bias)
            return super()._apply_head(lm_head, hidden_states, embedding_bias)


def register_file_backend() -> None:
    """Adds to vLLM's weight transfer a way through a safetensors file that trainer and server both see."""
    from dataclasses import dataclass

    from safetensors.torch import load_file
    from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
    from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        pass

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        path: str

    class FileTransfer(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls, update_info_cls = InitInfo, UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            pass

        def start_weight_update(self) -> None:
            pass

        def receive_weights(self, update_info: UpdateInfo) -> None:
            load_weights(self.model, self.model_config, load_file(update_info.path))

        def finish_weight_update(self) -> None:
            pass

        def shutdown(self) -> None:
            pass

    if FILE_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(FILE_BACKEND, FileTransfer)


def gpu_transfer(
    backend: str, client: Any, host: str, port: int, world_size: int
) -> Callable[[Mapping[str, Tensor]], None]:
    """vLLM's trainer side of `nccl` or `ipc` to one server; each call sends the weights it is given. Not yet run on a
    GPU."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Weights(WeightSource):
        # Not vLLM's source over the module: that gives masters where the model is in shards, and takes all ranks.
        tensors: Mapping[str, Tensor] = {}

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in unmerged(self.tensors).items()]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            return iter(self.tensors.items())

    info = (
        IPCTrainerInitInfo(rank=0)
        if backend == "ipc"
        else NCCLTrainerInitInfo(rank=0, master_address=host, master_port=port, world_size=world_size + 1)
    )
    source, transfer = Weights(), None

    def send(tensors: Mapping[str, Tensor]) -> None:
        nonlocal transfer
        source.tensors = tensors
        try:
            if transfer is None:
                transfer = WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
            transfer.send_weights()
        finally:
            source.tensors = {}

    return send


def serve(arguments: Sequence[str]) -> None:
    """vLLM's own OpenAI server in this process, until a signal ends it."""
    import runpy
    import sys

    sys.argv = ["vllm", *arguments]
    # Not the command `vllm serve`: that asks for a distribution of that name, which a build for CPUs has not.
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
