"""Whole runs of a few steps: what they write, that a resume changes nothing, and how they stop."""

import json
import os
import random
import re
import signal

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import load_latest

from prime_trainer import loop, sft
from prime_trainer.models import loading
from prime_trainer.models.model_files import ModelError
from prime_trainer.prm import score as prm_score
from prime_trainer.prm import train as prm_train
from prime_trainer.run.checkpoint import save
from prime_trainer.verify import Verdict

TIMES = {"time/rollout", "time/verify", "time/prm", "time/policy", "time/total"}


class RandomVerifier:
    """Scores a text by its bytes: both outcomes occur, and the same text always has the same."""

    @classmethod
    def from_config(cls, cfg):
        return cls()

    def score(self, items):
        return [Verdict(float(random.Random(text).random() < 0.5), None) for _, text in items]

    def close(self):
        pass


@pytest.fixture(autouse=True)
def verifier(monkeypatch):
    monkeypatch.setattr(loop, "Verifier", RandomVerifier)


def rows(path, drop=("time",)):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in drop and not k.startswith("time/")} for line in lines]


def weights(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_run_end_to_end(run_config, model_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final = loop.run(run_config(eval={"every": 2, "sampled": 2}))
    out = tmp_path / "run"
    assert final == out / "final"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in lines] == [
        *[("eval", 0), ("rl", 1), ("rl", 2), ("eval", 2), ("rl", 3), ("eval", 3)]
    ]
    trained = [r for r in lines if r["stage"] == "rl"]
    wanted = {"reward", "kept_reward", "entropy", "response_length", "truncated", "prm_loss", "prm_pair_accuracy"}
    wanted |= {"policy_loss", "clip_fraction", "approx_kl", "policy_grad_norm", "prm_grad_norm", "groups_kept"}
    for row in trained:
        assert wanted | TIMES <= row.keys() and row["groups_kept"] == 2
        assert row["policy_grad_norm"] > 0 and row["prm_grad_norm"] > 0
    assert trained[0]["prm_loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert {"greedy", "sampled", "format", "n"} <= lines[0].keys() and lines[0]["n"] == 3
    samples = rows(out / "samples.jsonl")
    assert {s["step"] for s in samples} == {1, 2, 3}
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["process_rewards"]) == len(sample["advantages"])
    assert all(reward == 0 for s in samples if s["step"] == 1 for reward in s["process_rewards"])
    assert any(reward != 0 for s in samples if s["step"] == 3 for reward in s["process_rewards"])
    start = weights(model_dir)
    for name in ("final", "prm"):
        AutoModelForCausalLM.from_pretrained(out / name)
        AutoTokenizer.from_pretrained(out / name)
        assert any(not torch.equal(start[k], v) for k, v in weights(out / name).items())
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    made_with = json.loads((out / "environment.json").read_text())
    assert made_with["packages"]["torch"] == torch.__version__ and made_with["cores"] == os.cpu_count()
    assert made_with["commit"] is None or re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", made_with["commit"])
    assert not list(out.glob("**/*.partial")) and load_latest(out)["step"] == 3
    with pytest.raises(ValueError, match="already holds a run; give another --output, or --resume"):
        loop.run(run_config())


VARIANTS = {
    "after": {},
    "minibatches": {
        "policy": {"minibatches": 2, "epochs": 2},
        "prm": {"minibatches": 2},
        "model": {"dtype": "bfloat16"},
    },
    "surplus": {"filter": {"low": 0.1, "high": 0.9}, "rollout": {"prompts_per_step": 3, "n": 4}},
    "outcome only": {"algorithm": {"process_coef": 0.0}},
    "pairs": {"prm": {"kind": "dpo", "granularity": "step"}, "policy": {"kl_coef": 0.1, "kl_estimator": "k2"}},
    "prefix": {
        "prm": {"kind": "prefix", "balance": True, "margin": 2.0},
        "algorithm": {"estimator": "grpo", "process_return": "gae", "whiten": False},
    },
    "candidates": {
        "prm": {"ref_type": "policy", "kind": "prefix", "update": "after"},
        "algorithm": {"process_return": "gae", "candidates": {"coef": 0.1, "min_prob": 0.05}},
        "policy": {"minibatches": 2},
    },
    "policy reference": {"prm": {"ref_type": "policy", "update": "before", "granularity": "step"}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_resume_is_exact(run_config, tmp_path, name):
    changes = VARIANTS[name]
    loop.run(run_config(output=tmp_path / "whole", steps=4, **changes))
    loop.run(run_config(output=tmp_path / "parts", steps=2, **changes))
    loop.run(run_config(output=tmp_path / "parts", steps=4, resume=True, **changes))
    assert_same_weights(tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    if name != "outcome only":
        assert_same_weights(tmp_path / "whole" / "prm", tmp_path / "parts" / "prm")
    whole = [r for r in rows(tmp_path / "whole" / "metrics.jsonl") if r["stage"] == "rl"]
    parts = [r for r in rows(tmp_path / "parts" / "metrics.jsonl") if r["stage"] == "rl"]
    assert whole == parts and len(whole) == 4
    if name == "candidates":
        assert all(row["candidates"] > 0 and 0 < row["candidate_mass"] <= 1 for row in whole)
        assert all(row["distribution_loss"] != 0 for row in whole)
    assert rows(tmp_path / "whole" / "samples.jsonl") == rows(tmp_path / "parts" / "samples.jsonl")


ADAPTER = {"model": {"adapter": {"rank": 4}}}


@pytest.mark.parametrize("name", ["minibatches", "policy reference"])
def test_adapters_resume_exactly(run_config, model_dir, tmp_path, name):
    changes = {**VARIANTS[name], "model": {**VARIANTS[name].get("model", {}), **ADAPTER["model"]}}
    loop.run(run_config(output=tmp_path / "whole", steps=4, **changes))
    loop.run(run_config(output=tmp_path / "parts", steps=2, **changes))
    loop.run(run_config(output=tmp_path / "parts", steps=4, resume=True, **changes))
    for model in ("final", "prm"):
        assert_same_weights(tmp_path / "whole" / model, tmp_path / "parts" / model)
        assert any(not torch.equal(weights(model_dir)[k], v) for k, v in weights(tmp_path / "whole" / model).items())
    whole, parts = (
        [r for r in rows(tmp_path / each / "metrics.jsonl") if r["stage"] == "rl"] for each in ("whole", "parts")
    )
    assert whole == parts and len(whole) == 4
    samples = rows(tmp_path / "whole" / "samples.jsonl")
    assert samples == rows(tmp_path / "parts" / "samples.jsonl")
    assert any(reward != 0 for s in samples if s["step"] == 4 for reward in s["process_rewards"])


def test_a_checkpoint_of_adapters_has_nothing_of_the_base(run_config, tmp_path):
    loop.run(run_config(output=tmp_path / "run", steps=1, **ADAPTER))
    # The PRM and its reference are one model until the PRM's adapter has learnt.
    assert all(reward == 0 for s in rows(tmp_path / "run" / "samples.jsonl") for reward in s["process_rewards"])
    state = load_latest(tmp_path / "run")
    for name in ("policy", "prm"):
        sizes = [t.numel() for t in state[name]["master"]]
        assert sum(sizes) == 2 * 4 * (3 * (64 + 128) + 2 * (64 + 64) + 2 * (64 + 32))
        assert len(state[name]["optimizer"]["state"]) == len(sizes) == 2 * 7 * 2


def test_without_process_rewards_no_prm_is_loaded(run_config, monkeypatch, tmp_path):
    import prime_kernels as pk

    loaded, seen = [], []
    load, advantages = loading.load_model, pk.rloo_advantages
    monkeypatch.setattr(loading, "load_model", lambda cfg: loaded.append(cfg) or load(cfg))

    def spy(process_rewards, outcomes, cu_seqlens, cu_groups, **options):
        got = advantages(process_rewards, outcomes, cu_seqlens, cu_groups, **options)
        seen.append((process_rewards, got.advantages, advantages(None, outcomes, cu_seqlens, cu_groups).advantages))
        return got

    monkeypatch.setattr(pk, "rloo_advantages", spy)
    loop.run(run_config(steps=2, algorithm={"process_coef": 0.0}))
    assert len(loaded) == 1 and not (tmp_path / "run" / "prm").exists()
    assert len(seen) == 2
    for rewards, got, plain in seen:
        assert rewards is None and torch.equal(got, plain)
    assert not any("prm_loss" in r for r in rows(tmp_path / "run" / "metrics.jsonl"))


def test_a_prm_trained_before_is_gone_on_with(run_config, tmp_path):
    """Its rewards are those of its own weights from the first step on, and another model's are refused."""
    loop.run(run_config(output=tmp_path / "before", steps=1, prm={"lr": 1e-3}))
    trained = tmp_path / "before" / "prm"
    assert json.loads((trained / "prm.json").read_text()) == {"kind": "ce", "beta": 0.05}  # how `score` reads it
    loop.run(run_config(output=tmp_path / "own", steps=2, prm={"path": trained, "lr": 1e-12}))
    loop.run(run_config(output=tmp_path / "none", steps=2, prm={"lr": 1e-12}))
    of = {name: rows(tmp_path / name / "samples.jsonl")[0]["process_rewards"] for name in ("own", "none")}
    assert max(map(abs, of["own"])) > 1e-4 > max(map(abs, of["none"]))
    started, ended = weights(trained), weights(tmp_path / "own" / "prm")
    assert all(torch.allclose(started[key], ended[key], rtol=0, atol=1e-9) for key in started)
    with pytest.raises(ValueError, match=r"trained with kind 'ce' \(prm\.json\), got prm\.kind = 'prefix'"):
        loop.run(run_config(output=tmp_path / "refused", prm={"path": trained, "kind": "prefix"}))
    other = tiny.write_model(tmp_path / "other", sizes={"intermediate_size": 96})
    with pytest.raises(ModelError, match=r"prm\.path and model\.path .* intermediate_size is 96 and 128"):
        loop.run(run_config(output=tmp_path / "refused", prm={"path": other}))
    loop.run(run_config(output=tmp_path / "resumed", steps=1, prm={"path": trained}))
    tiny.write_model(trained)
    with pytest.raises(ValueError, match="the files of prm are not what they were"):
        loop.run(run_config(output=tmp_path / "resumed", steps=2, prm={"path": trained}, resume=True))


def interrupted_after(monkeypatch, step):
    train_step = loop.Run.train_step

    def train_then_interrupt(self):
        result = train_step(self)
        if self.step == step:
            signal.raise_signal(signal.SIGINT)
        return result

    monkeypatch.setattr(loop.Run, "train_step", train_then_interrupt)


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(run_config, monkeypatch, tmp_path):
    loop.run(run_config(output=tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupted_after(patch, 1)
        loop.run(run_config(output=tmp_path / "parts"))
    assert load_latest(tmp_path / "parts")["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    loop.run(run_config(output=tmp_path / "parts", resume=True))
    assert_same_weights(tmp_path / "whole" / "final", tmp_path / "parts" / "final")
    assert rows(tmp_path / "whole" / "metrics.jsonl") == rows(tmp_path / "parts" / "metrics.jsonl")


def test_resume_refuses_another_run(run_config, tmp_path):
    with pytest.raises(ValueError, match=r"--resume: .* has no checkpoint"):
        loop.run(run_config(resume=True))
    loop.run(run_config(steps=1))
    with pytest.raises(ValueError, match=r"--resume: the configuration has changed \(policy: .*0\.001.*0\.5"):
        loop.run(run_config(resume=True, policy={"lr": 0.5}))
    with pytest.raises(ValueError, match=r"changed \(seed: 0 -> 1\)"):
        loop.run(run_config(resume=True, seed=1))
    loop.run(run_config(resume=True, steps=2, eval={"every": 1}))  # its length and its reporting may change


def test_a_torn_checkpoint_is_not_picked_up(tmp_path, monkeypatch):
    save(tmp_path, 1, {"step": 1}, keep=2)

    def torn(state, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2, {"step": 2}, keep=2)
    assert load_latest(tmp_path) == {"step": 1}
    (tmp_path / "checkpoints" / ".step_000003.partial").mkdir()  # a crash that could not clean up
    assert load_latest(tmp_path) == {"step": 1}
    for step in (2, 3):
        save(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step_*")) == ["step_000002", "step_000003"]


def test_sft_overfits_a_few_answers(run_config, tmp_path):
    final = sft.run(run_config(sft={"demonstrations": 4, "epochs": 30, "lr": 3e-3}))
    losses = [r["loss"] for r in rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 30 and losses[-1] < 0.2 * losses[0] and (final / "model.safetensors").exists()


def test_rl_goes_on_from_what_sft_saved(run_config, tmp_path):
    final = sft.run(run_config(output=tmp_path / "sft"))
    loop.run(run_config(model={"path": str(final)}, steps=1))
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("ref_type", ["freeze", "policy"])
def test_models_make_one_pass_each_in_one_layout(run_config, ref_type):
    """Reference and old policy without gradients, PRM and policy with them: nothing is made to be thrown away."""
    run = loop.Run(run_config(prm={"ref_type": ref_type, "minibatches": 1}))
    passes = []
    models = {"policy": run.policy.model, "prm": run.prm.model} | ({} if run.ref is None else {"reference": run.ref})
    for name, model in models.items():

        def note(module, args, given, name=name):
            if given.get("use_cache") is False:  # not those that sample
                passes.append((name, torch.is_grad_enabled(), tuple(given["input_ids"].shape)))

        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    run.train_step()
    run.close()
    wanted = [("prm", True), ("policy", True)]
    wanted += [("reference", False)] if ref_type == "freeze" else []
    wanted += [("policy", False)] if run.needs.old_logp else []
    assert sorted(found[:2] for found in passes) == sorted(wanted)
    assert len({shape for *_, shape in passes}) == 1


@pytest.mark.parametrize("key", ["prm.path", "train_prm.reference", "score.reference"])
def test_a_missing_model_is_named_by_its_own_key(run_config, tmp_path, key):
    section, name = key.split(".")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1+1", "completions": ["2", "3"], "correctness": [1, 0]}))
    given = {section: {name: tmp_path / "none"}}
    if section != "prm":
        given[section]["path"] = rows
    cfg = run_config(**given)
    with pytest.raises(ModelError, match=rf"^{key} must be a model directory, .* got '.*/none': no such directory"):
        {"prm": loop.run, "train_prm": prm_train.run, "score": prm_score.run}[section](cfg)
