"""Engines sample with the policy's adapter: they get merged weights after every update."""

import pytest
import torch
from helpers.engines import rows
from helpers.ranks import RandomVerifier

from prime_trainer import loop
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading


@pytest.mark.parametrize("engine", ["vllm", "vllm-server"])
def test_an_engine_follows_the_adapter(configure, directories, monkeypatch, engine):
    pytest.importorskip("peft", reason="peft is not installed: pip install 'prime-process-rewards[adapters]'")
    monkeypatch.setattr(loop, "Verifier", RandomVerifier)
    model = {"path": str(directories[True]), "dtype": "float32", "device": "cpu"}
    cfg = configure(engine, model=model | {"adapter": {"rank": 8}}, policy={"lr": 3e-2, "minibatches": 1})
    final = loop.run(cfg)
    # Log-probs of engine and trainer are the same to rounding, while the policy has gone far from its base.
    steps = rows(cfg.output)
    assert len(steps) == 3 and all(row["mismatch_max"] < 1e-3 for row in steps)
    ids = torch.arange(10, 30)[None]
    base, merged = (
        loading.load_model(ModelConfig(**model | {"path": str(path)})) for path in (directories[True], final)
    )
    with torch.no_grad():
        apart = (base(ids).logits.log_softmax(-1) - merged(ids).logits.log_softmax(-1)).abs().max()
    assert apart > 0.1
