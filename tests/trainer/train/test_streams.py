"""Whether passes are rows with masks or varlen follows from the model's attention, in every stage."""

import json

import pytest
import torch
from helpers import tiny

from prime_trainer import loop, sft
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import forward, loading
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


@pytest.fixture(params=["rows", "varlen"])
def layout(request, monkeypatch):
    """sdpa takes a varlen pass too, by the positions that restart at 0: the numbers must be those of rows."""
    if request.param == "varlen":
        monkeypatch.setattr(forward, "is_varlen", lambda model: True)
    return request.param


def check(passes, layout):
    assert passes
    if layout == "rows":
        assert any(masked for _, masked in passes)
    else:
        assert set(passes) == {(1, False)}


def test_flash_attention_is_varlens(model):
    assert not forward.is_varlen(model) and not Batch.for_model(model, tiny.random_groups()).varlen
    model.config._attn_implementation = "flash_attention_2"
    assert forward.is_varlen(model) and Batch.for_model(model, tiny.random_groups()).varlen


@pytest.fixture(scope="module")
def numbers():
    """By stage, of whichever layout ran first."""
    return {}


def same(numbers, stage, values):
    assert values == pytest.approx(numbers.setdefault(stage, values), rel=1e-3, abs=1e-4)


def losses(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_sft(run_config, passes, layout, numbers):
    cfg = run_config(sft={"pack": True})
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


def test_the_cards_mask_and_two_attentions_are_refused(model_dir, tokenizer):
    one, other = tiny.load(model_dir), tiny.load(model_dir)
    one.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="prm and reference must have the same attention"):
        score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer)
    other.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="compat = 'eurus-card' masks pad tokens"):
        score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer, compat="eurus-card")


def test_cached_log_probs_belong_to_an_attention(model_dir, tokenizer, tmp_path):
    groups = tiny.random_groups()
    reference = Reference(ModelConfig(path=str(model_dir), dtype="float32"), tokenizer, tmp_path, 4096)
    (values,) = reference.log_probs([groups])
    assert torch.isfinite(values).all()
    flash = ModelConfig(path=str(model_dir), dtype="float32", attention="flash_attention_2")
    with pytest.raises(loading.ModelError, match="needs the package flash-attn"):
        Reference(flash, tokenizer, tmp_path, 4096).log_probs([groups])
