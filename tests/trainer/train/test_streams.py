"""Whether passes are rows with masks or varlen follows from the model's attention, in every stage."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny

from prime_trainer import loop, sft
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import forward, loading, traits
from prime_trainer.prm import score_steps, train
from prime_trainer.prm.reference_cache import Reference
from prime_trainer.train.batch import Batch

ROWS = [
    {"prompt": f"What is {k} + 3?", "completions": ["\\boxed{5}", f"so 2 + {k}\n\nno"], "correctness": [1, 0]}
    for k in range(4)
]  # fmt: skip


@pytest.fixture
def passes(monkeypatch):
    """What models read from now on: (rows, whether there is a mask) of each forward pass in training and scoring."""
    found, read = [], forward.hidden_states

    def recorded(model, input_ids, position_ids, attention_mask):
        found.append((input_ids.shape[0], attention_mask is not None))
        return read(model, input_ids, position_ids, attention_mask)

    for module in ("prime_trainer.train.forward.hidden_states", "prime_trainer.models.forward.hidden_states"):
        monkeypatch.setattr(module, recorded)
    return found


@pytest.fixture(params=["shared", "varlen"])
def layout(request, monkeypatch):
    """sdpa takes a varlen pass too, by the positions that restart at 0: the numbers must be those of shared rows."""
    if request.param == "varlen":
        monkeypatch.setattr(traits, "layout_of", lambda models: "varlen")
        found = traits.of
        monkeypatch.setattr(traits, "of", lambda model: dataclasses.replace(found(model), layout="varlen"))
    return request.param


def check(passes, layout):
    assert passes
    assert {rows for rows, _ in passes} == {1}
    assert any(masked for _, masked in passes) == (layout == "shared")


def test_flash_attention_is_varlen(model, monkeypatch):
    assert Batch.for_model(model, tiny.random_groups()).layout == "shared"
    # SDPA stands in for its kernels: it tells sequences apart by the same positions.
    found = traits._prove(model, "flash_attention_2")
    assert found.layout == "varlen" and found.masks is None
    model.traits = dataclasses.replace(found, attention="sdpa")
    assert Batch.for_model(model, tiny.random_groups()).layout == "varlen"


@pytest.fixture(scope="module")
def numbers():
    """By stage, of whichever layout ran first."""
    return {}


def same(numbers, stage, values):
    assert values == pytest.approx(numbers.setdefault(stage, values), rel=1e-3, abs=1e-4)


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_sft(run_config, passes, layout, numbers):
    cfg = run_config()
    sft.run(cfg)
    check(passes, layout)
    same(numbers, "sft", losses(cfg.output))


def test_training_of_a_prm_and_its_reference(run_config, tmp_path, passes, layout, numbers):
    path, steps = tmp_path / "rows.jsonl", tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    labelled = [{"prompt": "?", "steps": ["so", f"{k} is 5"], "step_labels": [1, 0]} for k in range(3)]
    steps.write_text("".join(json.dumps(row) + "\n" for row in labelled))
    own = {"path": path, "step_path": steps, "cache": tmp_path / "cache", "lr": 1e-3, "batch_size": 4, "epochs": 2}
    cfg = run_config(train_prm=own)
    train.run(cfg)
    check(passes, layout)
    same(numbers, "prm", losses(cfg.output))


def test_scores(model_dir, model, tokenizer, passes, layout, numbers):
    prm = tiny.load(model_dir)
    with torch.no_grad():
        prm.model.norm.weight.mul_(1.1)
    found = score_steps(ROWS, prm=prm, reference=model, tokenizer=tokenizer, beta=1.0)
    check(passes, layout)
    same(numbers, "score", [value for rewards in found for value in rewards.cumulative])


def test_rl(run_config, passes, layout):
    loop.run(run_config(steps=1))
    check(passes, layout)


def test_models_of_two_layouts_are_read_one_response_a_row(model_dir, tokenizer, passes):
    one, other = tiny.load(model_dir), tiny.load(model_dir)
    want = score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer, beta=1.0)
    del passes[:]
    one.traits = dataclasses.replace(one.traits, layout="rows", masks=None)
    found = score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer, beta=1.0)
    assert passes and not any(masked for _, masked in passes)
    for a, b in zip(found, want, strict=True):
        assert a.cumulative == pytest.approx(b.cumulative, abs=1e-5)
    with pytest.raises(ValueError, match=r"compat = 'eurus-card' masks pad tokens .* prm \(LlamaForCausalLM with sdpa"):
        score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer, compat="eurus-card")


def test_cached_log_probs_belong_to_an_attention(model_dir, tokenizer, tmp_path):
    groups = tiny.random_groups()
    reference = Reference(ModelConfig(path=str(model_dir), dtype="float32"), tokenizer, tmp_path, 4096)
    (values,) = reference.log_probs([groups])
    assert torch.isfinite(values).all()
    flash = ModelConfig(path=str(model_dir), dtype="float32", attention="flash_attention_2")
    with pytest.raises(loading.ModelError, match="needs the package flash-attn"):
        Reference(flash, tokenizer, tmp_path, 4096).log_probs([groups])
