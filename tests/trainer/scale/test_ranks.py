"""The same run on one, two and four processes: the same losses and the same weights."""

import pytest
import torch
from helpers import ranks, tiny
from helpers.checkpoints import load_latest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prime_trainer.scale.ranks import deal


def settings(**changes):
    """Surplus, several minibatches, a KL term and a reference: everything that has to be shared out."""
    return {
        "steps": 5,
        "rollout": {"prompts_per_step": 5, "n": 4, "max_new_tokens": 8},
        "filter": {"low": 0.1, "high": 0.9, "max_rounds": 2},
        # AdamW makes a whole step of a gradient next to nothing, its rounding included: where only that differs, the
        # weights differ by a share of the learning rate.
        "policy": {"lr": 2e-5, "minibatches": 2, "kl_coef": 0.01},
        "prm": {"lr": 3e-4, "minibatches": 2},
        "micro_batch_tokens": 120,
    } | changes


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory):
    cfg = make_config(output=tmp_path_factory.mktemp("alone") / "run", **settings())
    ranks.train(cfg, 0)
    return cfg.output


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        (2, {}),
        (4, {"activation_checkpointing": "full", "offload": ["policy", "prm", "reference"]}),
        (2, {"shard": False}),
    ],
    ids=str,
)
def test_any_number_of_ranks_trains_alike(make_config, tmp_path, alone, size, scale):
    cfg = make_config(output=tmp_path / "run", **settings(scale=scale))
    ranks.train(cfg, size)
    ranks.assert_close_runs(alone, cfg.output)
    moved = load_file(alone / "final" / "model.safetensors")
    start = load_file(f"{cfg.model.path}/model.safetensors")
    assert max((moved[key] - start[key]).abs().max().item() for key in moved) > 1e-4
    assert len(ranks.rows(cfg.output)) == 7  # one record, not one a rank


@pytest.mark.parametrize(
    "changes",
    [
        {"prm": {"ref_type": "policy", "update": "before"}},
        {"algorithm": {"process_coef": 0.0}, "policy": {"epochs": 2}},
        {
            "algorithm": {"estimator": "grpo", "process_return": "gae", "whiten_of": "source"},
            "prm": {"kind": "kto", "lr": 3e-4, "minibatches": 2},
        },
        {"algorithm": {"estimator": "reinforce", "process_return": "min"}, "prm": {"balance": True, "lr": 3e-4}},
        {
            "algorithm": {"process_return": "gae", "candidates": {"coef": 0.2}},
            "prm": {"kind": "prefix", "balance": True, "lr": 3e-4, "ref_type": "policy"},
        },
    ],
    ids=["policy as reference", "outcomes alone", "kto, grpo and gae", "balanced, reinforce and min", "candidates"],
)
def test_other_algorithms_on_ranks(make_config, tmp_path, changes):
    runs = [make_config(output=tmp_path / str(size) / "run", **(settings(steps=2) | changes)) for size in (0, 2)]
    for cfg, size in zip(runs, (0, 2), strict=True):
        ranks.train(cfg, size)
    ranks.assert_close_runs(*(cfg.output for cfg in runs))


def test_bfloat16_shards_have_float32_masters(make_config, tmp_path):
    """Rounding makes other samples, so no run in one process to compare with: what must hold of any."""
    cfg = make_config(output=tmp_path / "run", **settings(steps=2, model={"dtype": "bfloat16"}))
    ranks.train(cfg, 2)
    saved = load_latest(cfg.output)
    for name, directory in (("policy", "final"), ("prm", "prm")):
        weights = load_file(cfg.output / directory / "model.safetensors")
        masters = {tuple(m.shape): m for m in saved[name]["master"]}
        assert all(m.dtype == torch.float32 for m in saved[name]["master"])
        embedding = weights["model.embed_tokens.weight"]
        master = masters[tuple(embedding.shape)]
        assert embedding.dtype == torch.bfloat16 and torch.equal(embedding, master.bfloat16())
        assert not torch.equal(master, master.bfloat16().float())  # or the updates would have been rounded away
    again = AutoModelForCausalLM.from_pretrained(cfg.output / "final")
    assert again.dtype == torch.bfloat16 and torch.equal(again.get_input_embeddings().weight, again.lm_head.weight)


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_that_share_out_the_vocabulary_train_alike(make_config, tmp_path, tied):
    """With an entropy term, whose gradient goes through the whole softmax."""
    model = tiny.load(tiny.write_model(tmp_path / "model", tied=tied))
    model.resize_token_embeddings(304)  # 301 would not divide
    model.save_pretrained(tmp_path / "model")
    options = settings(model={"path": str(tmp_path / "model")}, steps=3)
    options["policy"] |= {"entropy_coef": 0.01, "kl_coef": 0.0 if tied else 0.01}
    alone = make_config(output=tmp_path / "alone" / "run", **options)
    split = make_config(output=tmp_path / "split" / "run", **options, scale={"vocab_parallel_head": True})
    ranks.train(alone, 0)
    ranks.train(split, 2)
    ranks.assert_close_runs(alone.output, split.output)


def test_a_vocabulary_that_does_not_divide_is_refused(make_config, tmp_path):
    cfg = make_config(output=tmp_path / "run", **settings(scale={"vocab_parallel_head": True}))
    assert ranks.wait(ranks.start(cfg, 2)) == [2, 2]
    want = "scale.vocab_parallel_head = true: the head's 301 rows must divide by the number of ranks, got 2"
    assert want in ranks.log(cfg).read_text()


def test_adapters_train_alike_on_ranks(make_config, tmp_path):
    """The base in shards once, float32 masters of the adapters; and whole copies on every rank."""
    model = {"adapter": {"rank": 8}}
    scales = {"alone": {}, "shards": {"activation_checkpointing": "full"}, "copies": {"shard": False}}
    runs = {}
    for name, scale in scales.items():
        runs[name] = make_config(output=tmp_path / name / "run", **settings(steps=3, model=model, scale=scale))
        ranks.train(runs[name], 0 if name == "alone" else 2)
    for name in ("shards", "copies"):
        ranks.assert_close_runs(runs["alone"].output, runs[name].output)
        for directory in ("final", "prm"):
            one, other = (
                load_file(runs[each].output / directory / "adapter" / "adapter_model.safetensors")
                for each in ("alone", name)
            )
            assert one.keys() == other.keys()
            assert max((one[key] - other[key]).abs().max().item() for key in one) < 1e-5
    moved = [value.abs().max().item() for key, value in one.items() if "lora_B" in key]
    assert len(moved) == 14 and min(moved) > 1e-4
    masters = load_latest(runs["shards"].output)["policy"]["master"]
    assert len(masters) == 28 and all(m.dtype == torch.float32 and m.shape[0] in (8, 32, 64, 128) for m in masters)


def test_adapters_on_a_head_in_shares(make_config, tmp_path):
    """In bfloat16: the base's shards stay so, the adapters' masters are float32; and the run resumes exactly."""
    model = tiny.load(tiny.write_model(tmp_path / "model"))
    model.resize_token_embeddings(304)
    model.save_pretrained(tmp_path / "model")
    options = settings(model={"path": str(tmp_path / "model"), "dtype": "bfloat16", "adapter": {"rank": 8}})
    options |= {"scale": {"vocab_parallel_head": True}}
    whole = make_config(output=tmp_path / "whole" / "run", **options | {"steps": 2})
    ranks.train(whole, 2)
    part = make_config(output=tmp_path / "part" / "run", **options | {"steps": 1})
    ranks.train(part, 2)
    ranks.train(part.model_copy(update={"steps": 2, "resume": True}), 2)
    one, other = (load_file(cfg.output / "final" / "model.safetensors") for cfg in (whole, part))
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == torch.bfloat16 for key in one)
    start = load_file(tmp_path / "model" / "model.safetensors")
    same = {key for key in one if torch.equal(one[key], start[key].bfloat16())}
    assert same == {key for key in one if "proj" not in key}
    masters = load_latest(whole.output)["prm"]["master"]
    assert all(m.dtype == torch.float32 for m in masters)
    assert any(not torch.equal(m, m.bfloat16().float()) for m in masters)


def test_dealing_balances_totals():
    assert deal([5, 1, 1, 1, 1, 1], 2) == [[0], [1, 2, 3, 4, 5]]
    assert deal([7, 9], 3) == [[1], [0], []]
    loads = [13, 2, 8, 21, 5, 1, 34, 3]
    parts = deal(loads, 3)
    assert sorted(i for part in parts for i in part) == list(range(8))
    totals = [sum(loads[i] for i in part) for part in parts]
    assert max(totals) == 34 and min(totals) >= 26
