"""The traps of an engine in the trainer's process, each against vLLM itself."""

import gc
import os

import psutil
import pytest
import torch
from helpers.engines import Engine, prompts, shared_memory

from prime_trainer.models import loading
from prime_trainer.rollout import EngineDied, Sampling
from prime_trainer.rollout.vllm import engine as vllm_engine

PROMPTS = prompts()


@pytest.fixture(scope="module")
def engine(configure):
    engine = Engine(configure("vllm"))
    yield engine
    engine.sampler.close()


@pytest.fixture(autouse=True)
def healthy(engine):
    """Whatever a test did to the engine, the next one gets it with the model's weights."""
    yield
    engine.sampler.restart()
    engine.push(0)


def test_a_tied_head_is_stale_unless_it_is_packed_again(engine, monkeypatch):
    engine.shake(1)
    with monkeypatch.context() as patch:
        from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

        patch.setattr(UnquantizedEmbeddingMethod, "process_weights_after_loading", lambda self, layer: None)
        engine.push(1)
        assert engine.disagreements(PROMPTS) > 4
    engine.push(2)
    assert engine.disagreements(PROMPTS) == 0


def test_old_keys_and_values_survive_unless_the_prefix_cache_is_reset(engine, monkeypatch):
    llm = engine.sampler._engine._llm
    assert engine.disagreements(PROMPTS) == 0
    engine.shake(2)
    with monkeypatch.context() as patch:
        patch.setattr(llm, "reset_prefix_cache", lambda: True)
        engine.push(1)
        assert engine.disagreements(PROMPTS) > 4
        patch.setattr(llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(EngineDied, match="prefix cache could not be reset"):
            engine.push(2)
    engine.push(3)
    assert engine.disagreements(PROMPTS) == 0


def test_weights_that_the_engine_misses_are_an_error(engine):
    tensors = dict(loading.named_tensors(engine.model))
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    with pytest.raises(EngineDied, match=r"1 weights of the engine were not given: \['model.norm.weight'\]"):
        engine.sampler._engine.load(tensors)


def test_a_failed_update_ends_the_engine_and_a_new_one_goes_on(engine, monkeypatch):
    def fails(model, config, tensors):
        half = dict(list(tensors.items())[: len(tensors) // 2])
        load(model, config, half)

    load = vllm_engine.load_weights
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "load_weights", fails)
        with pytest.raises(EngineDied, match="a weight update failed: ValueError"):
            engine.push(1)
    with pytest.raises(EngineDied, match="holds no complete set of weights"):
        engine.greedy(PROMPTS)
    engine.sampler.restart()
    with pytest.raises(EngineDied, match="holds no complete set of weights"):
        engine.greedy(PROMPTS)
    engine.push(2)
    assert engine.disagreements(PROMPTS) == 0


def test_an_error_in_the_middle_leaves_nothing_to_be_sampled(engine, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        core = engine.sampler._engine._llm.llm_engine.engine_core.engine_core
        patch.setattr(core.model_executor, "execute_model", fails)
        with pytest.raises(EngineDied, match="vLLM failed while sampling: RuntimeError: out of memory"):
            engine.greedy(PROMPTS)
    with pytest.raises(EngineDied, match="no complete set of weights"):
        engine.greedy(PROMPTS)


def test_what_vllm_aborted_is_no_response():
    """A real abort is among the tests of the server, where others can cause one."""
    assert vllm_engine.finished([5], [-1.0], "length", 3).weight_version == 3
    with pytest.raises(EngineDied, match="vLLM ended a response after 2 tokens with the reason 'abort'"):
        vllm_engine.finished([5, 6], [-1.0, -1.0], "abort", 3)


def test_updates_take_no_memory(engine):
    process = psutil.Process()

    def resident():
        gc.collect()
        return process.memory_info().rss

    for version in range(1, 6):
        engine.push(version)
        engine.greedy(PROMPTS[:4])
    before, updates = resident(), 80
    for version in range(6, 6 + updates):
        engine.shake(version)
        engine.push(version)
        if version % 4 == 0:
            engine.greedy(PROMPTS[:4])
    weights = sum(t.nbytes for _, t in loading.named_tensors(engine.model))
    assert resident() - before < updates * weights / 4  # a copy kept of every fourth update would be noticed
    assert engine.disagreements(PROMPTS) == 0


def test_weights_between_gpus_are_those_that_were_pushed(engine, monkeypatch):
    """vLLM's transfer is not run here; what it would be given is, through its own base class of sources."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    calls, sent = [], []

    class Transfer:
        def send_weights(self):
            names = [meta.name for meta in calls[0]["source"].metadata()]
            assert names == [name for name, _ in calls[0]["source"]]
            sent.append({k: v for group in calls[0]["source"].iter_groups() for k, v in zip(*group, strict=True)})

    def trainer_init(info, **given):
        calls.append({"info": info, **given})
        return Transfer()

    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", trainer_init)
    tensors = engine.sampler.shape.check_weights(loading.named_tensors(engine.model))
    for backend in ("nccl", "ipc"):
        calls.clear()
        send = vllm_engine.gpu_transfer(backend, "client", "127.0.0.1", 12345, 2)
        send(tensors)
        send({name: tensor + 1 for name, tensor in tensors.items()})
        (call,) = calls  # one rendezvous for all updates
        assert call["info"].backend == backend and call["info"].rank == 0 and call["client"] == "client"
        first, second = sent[-2:]
        assert list(first) == list(second) == list(tensors)
        assert all(torch.equal(second[name], first[name] + 1) for name in tensors)
        assert not call["source"].tensors  # nothing is kept between updates
    assert calls[0]["info"] is not None


def test_torch_keeps_its_threads(engine):
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert torch.get_num_threads() == threads + 1
    torch.set_num_threads(threads)


def test_what_vllm_cannot_build_is_said(configure):
    cfg = configure("vllm", rollout={"vllm": {"kv_cache_gib": 0.0001}})
    with pytest.raises(
        EngineDied, match=r"vLLM cannot build its engine \(keys rollout\.vllm\.\*\): .*(KV cache|memory|block)"
    ):
        Engine(cfg)
    cfg = configure("vllm", rollout={"vllm": {"kv_cache_gib": 4000}})
    with pytest.raises(EngineDied, match=r"vLLM cannot build its engine \(keys rollout\.vllm\.\*\): .*memory"):
        Engine(cfg)


def test_sleep_frees_and_an_update_wakes(configure):
    """On a CPU vLLM's own sleep does nothing; that the order of calls is right shows in that sampling goes on."""
    engine = Engine(configure("vllm", rollout={"vllm": {"kv_cache_gib": 0.125, "sleep": True}}))
    try:
        assert engine.disagreements(PROMPTS[:4]) == 0
        engine.sampler.release()
        with pytest.raises(EngineDied, match="no complete set of weights"):
            engine.greedy(PROMPTS[:4])
        engine.shake(3)
        engine.push(1)
        assert engine.disagreements(PROMPTS[:4]) == 0
    finally:
        engine.sampler.close()


def test_closing_leaves_nothing(configure, tmp_path):
    before, children = shared_memory(), set(psutil.Process().children(recursive=True))
    engine = Engine(configure("vllm"))
    directory = engine.sampler.directory.name
    engine.sampler.generate(PROMPTS[:1], 1, Sampling(4), [0])
    engine.sampler.close()
    engine.sampler.close()  # once more is harmless
    assert not os.path.exists(directory) and shared_memory() <= before
    assert set(psutil.Process().children(recursive=True)) <= children
    assert not torch.distributed.is_initialized()
