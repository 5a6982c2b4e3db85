"""Adapters through the stages: each trains one, and the next goes on with it."""

import json

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file

from prime_trainer import loop, sft
from prime_trainer.cli import main
from prime_trainer.config.run_config import RunConfig
from prime_trainer.models import loading, placement, tokenizers
from prime_trainer.models.model_files import ModelError
from prime_trainer.prm import train
from prime_trainer.rollout.sampler import model_shape
from prime_trainer.rollout.vllm.shared_file import SharedFile
from prime_trainer.run.metrics import METRICS


def adapter(path):
    return load_file(path / "adapter" / "adapter_model.safetensors")


def metrics(output):
    return [json.loads(line) for line in (output / METRICS).read_text().splitlines()]


def test_every_stage(run_config, model_dir, tmp_path, stop_after, capsys):
    """Warm-up, an offline PRM, RL from both, scores of the PRM, and an evaluation."""
    new = {"model": {"adapter": {"rank": 4, "alpha": 8}}}
    whole = sft.run(run_config(output=tmp_path / "sft", **new))
    with stop_after(2):
        sft.run(run_config(output=tmp_path / "parts", **new))
    parts = sft.run(run_config(output=tmp_path / "parts", resume=True, **new))
    assert all(torch.equal(value, adapter(parts)[name]) for name, value in adapter(whole).items())
    losses = [row["loss"] for row in metrics(tmp_path / "sft")]
    assert losses[-1] < losses[0]

    rows = [
        {"prompt": f"What is {k} + 3?", "completions": ["\\boxed{5}", "so 2 + 3"], "correctness": [1, 0]}
        for k in range(6)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"path": path, "cache": tmp_path / "cache", "lr": 1e-2, "epochs": 3, "batch_size": 8, "beta": 0.5}
    prm = train.run(run_config(output=tmp_path / "prm", train_prm=own, **new))
    found = metrics(tmp_path / "prm")
    assert found[0]["loss"] == pytest.approx(0.6931472, abs=1e-6) and found[-1]["loss"] < 0.6

    cfg = run_config(
        output=tmp_path / "rl", steps=1,
        model={"adapter": {"path": whole / "adapter"}}, prm={"path": prm / "adapter", "lr": 1e-3},
    )  # fmt: skip
    assert cfg.prm_model.adapter.path == prm / "adapter"
    loop.run(cfg)
    for start, end in ((whole, tmp_path / "rl" / "final"), (prm, tmp_path / "rl" / "prm")):
        steps = [(adapter(end)[name] - value).abs().max().item() for name, value in adapter(start).items()]
        assert 0 < max(steps) < 1.1e-3  # one step of AdamW
    assert json.loads((tmp_path / "rl" / "prm" / "adapter" / "prm.json").read_text())["beta"] == 0.05

    words = ["--model.path", str(model_dir), "--model.dtype", "float32", "--model.device", "cpu"]
    adapted = [*words, "--model.adapter.path", str(prm / "adapter"), "--score.path", str(path)]
    assert main(["score", *adapted, "--output", str(tmp_path / "one")]) == 0
    merged = ["--model.path", str(prm), *words[2:], "--score.path", str(path), "--score.reference", str(model_dir)]
    assert main(["score", *merged, "--output", str(tmp_path / "two")]) == 0
    one, two = ([json.loads(line) for line in (tmp_path / each / "scores.jsonl").open()] for each in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["rewards"]["cumulative"] == pytest.approx(b["rewards"]["cumulative"], abs=2e-4)
        assert a["rewards"]["cumulative"] != [0.0]
    assert main(["score", *adapted, "--score.reference", str(prm), "--output", str(tmp_path / "three")]) == 2
    assert "the reference of an adapter (model.adapter.path) is its base" in capsys.readouterr().err

    model = placement.load_used(cfg.model)
    again = tiny.load(whole)
    ids = torch.tensor([[5, 80, 33]])
    torch.testing.assert_close(model(input_ids=ids).logits, again(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_what_an_engine_is_given(model_dir, tmp_path, monkeypatch):
    """All weights merged, a tied head once, one at a time; the file has the same bits."""
    cfg = RunConfig(model={"path": str(model_dir), "device": "cpu", "adapter": {"rank": 4}}).model
    model = placement.load_trained(cfg, 0)
    for factors in model.factors().values():
        torch.nn.init.normal_(factors.b)
    shape = model_shape(model, tokenizers.load_tokenizer(cfg))
    merging = []
    merged = type(factors).merged
    monkeypatch.setattr(type(factors), "merged", lambda self, w: merging.append(w.shape) or merged(self, w))
    given = shape.check_weights(loading.named_tensors(model))
    plain = tiny.load(model_dir, "bfloat16").state_dict()
    assert not merging and set(given) == set(plain) - {"lm_head.weight"}
    with SharedFile(given) as path:
        sent = load_file(path)
    assert len(merging) == 14 and sent.keys() == given.keys()
    for name, value in sent.items():
        assert torch.equal(value, given[name]) and value.dtype == torch.bfloat16
        assert torch.equal(value, plain[name]) == (name not in model.factors())
    with pytest.raises(ValueError, match="1 are missing"):
        shape.check_weights({name: value for name, value in given.items() if name != "model.norm.weight"} | {
            "lm_head.weight": given["model.embed_tokens.weight"]})  # fmt: skip


def test_what_does_not_go_together(run_config):
    with pytest.raises(ValueError, match=r"scale.offload moves whole models, .* must be empty, got \['prm'\]"):
        run_config(model={"adapter": {"rank": 4}}, scale={"offload": ["prm"]})
    with pytest.raises(ValueError, match=r"model.compile must be false with model.adapter, got true"):
        run_config(model={"adapter": {"rank": 4}, "compile": True})
    model = run_config().model.path
    with pytest.raises(ModelError, match=r"prm.path = .* is no adapter directory: it has no adapter_config.json"):
        loop.Run(run_config(model={"adapter": {"rank": 4}}, prm={"path": model}))
