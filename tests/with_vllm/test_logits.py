"""Trainer and engine have the same logits in bfloat16: float32 sums where vLLM has them, else both round.

Layers of the model add nothing, so that hidden states have the same bits in vLLM and in transformers, and what is left
of the mismatch is the head's.
"""

import pytest
import torch
from helpers.engines import Engine, prompts

from prime_trainer.models import lm_head
from prime_trainer.rollout import EngineConfig, Sampling, follow_logits
from prime_trainer.rollout.vllm import engine as vllm_engine

PROMPTS = prompts()


@pytest.fixture
def make(configure, directories):
    """`make("vllm", tied=True)`: the engine beside its model, in bfloat16; closed at the end."""
    engines = []

    def build(kind, tied=True, **model):
        cfg = configure(kind, model={"path": str(directories[tied]), "dtype": "bfloat16", "device": "cpu", **model})
        engines.append(Engine(cfg))
        renew(engines[-1], 0)
        return engines[-1]

    yield build
    for engine in engines:
        engine.sampler.close()


@torch.no_grad()
def renew(engine, version):
    """Other embeddings and another head, and layers that add nothing."""
    generator = torch.Generator().manual_seed(version)
    for name, parameter in engine.model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif parameter.shape[0] == 301:
            # With a tied head a larger scale would only repeat the last token.
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    engine.push(version)


def head_class(worker):
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    (found,) = {type(module).__name__ for module in worker.get_model().modules() if isinstance(module, LogitsProcessor)}
    return found


def mismatches(engine):
    """Mean difference of log-probs between the engine and the trainer, by the logits of the trainer."""
    samples, found = engine.sampler.generate(PROMPTS, 2, Sampling(24), range(len(PROMPTS))), {}
    for logits in ("float32", "input"):
        lm_head.set_logits_dtype(engine.model, logits)
        found[logits] = engine.log_prob_differences(PROMPTS, samples, 1.0).mean().item()
    return found


@pytest.mark.parametrize(("kind", "tied"), [("vllm", True), ("vllm", False), ("vllm-server", True)])
def test_float32_logits_on_both_sides(make, kind, tied):
    """After an update, too: with a tied head and without, in process and served."""
    engine = make(kind, tied)
    cfg = EngineConfig(engine.cfg.rollout, engine.cfg.model, engine.cfg.output)
    assert engine.sampler.logits_dtype == "float32"
    assert follow_logits(cfg, engine.sampler, [engine.model]) is None
    assert lm_head.logits_dtype(engine.model) == "float32"
    if kind == "vllm":
        assert engine.sampler._engine._llm.collective_rpc(head_class) == ["Float32Logits"]
    for version in (1, 2):
        renew(engine, version)
        found = mismatches(engine)
        assert found["float32"] < 1e-5 < 1e-3 < found["input"]
    asked = engine.cfg.model.model_copy(update={"logits_dtype": "input"})
    with pytest.raises(ValueError, match=rf"logits_dtype = 'input' is .* the engine {kind} has float32 logits"):
        follow_logits(EngineConfig(cfg.rollout, asked, cfg.output), engine.sampler, [engine.model])


def test_an_engine_that_rounds_is_followed(make, monkeypatch):
    """As a vLLM that takes no notice of head_dtype; and as `model.logits_dtype = "input"` has it."""
    options = vllm_engine.engine_options

    def without(*given):
        return {key: value for key, value in options(*given).items() if key != "hf_overrides"}

    monkeypatch.setattr(vllm_engine, "engine_options", without)
    engine = make("vllm")
    cfg = EngineConfig(engine.cfg.rollout, engine.cfg.model, engine.cfg.output)
    assert engine.sampler.logits_dtype == "input"
    said = follow_logits(cfg, engine.sampler, [engine.model])
    assert said.startswith("model.logits_dtype = auto: 'input', as the engine vllm rounds its logits to bfloat16")
    assert lm_head.logits_dtype(engine.model) == "input"
    found = mismatches(engine)
    # A few sums lie on the border between two bfloat16 numbers, on which the two may differ.
    assert found["input"] < 0.2 * found["float32"] and found["float32"] > 1e-3
    asked = engine.cfg.model.model_copy(update={"logits_dtype": "float32"})
    with pytest.raises(ValueError, match=r"logits_dtype = 'float32' is .* the engine vllm rounds its logits to bfloat"):
        follow_logits(EngineConfig(cfg.rollout, asked, cfg.output), engine.sampler, [engine.model])
    monkeypatch.undo()
    rounded = engine.cfg.model.model_copy(update={"logits_dtype": "input"})
    assert "hf_overrides" not in vllm_engine.engine_options(cfg.rollout, rounded, True, None)
