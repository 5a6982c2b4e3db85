"""Offline training: losses and gradients against plain autograd, the cache, both stages, resume, what is refused."""

import json
import math
import shutil

import pytest
import torch
from helpers import tiny
from pydantic import ValidationError

from prime_kernels import prm_loss
from prime_trainer.cli import main
from prime_trainer.config.sections import ModelConfig, PRMConfig, TrainPRMConfig
from prime_trainer.models import loading, prm_record, tokenizers
from prime_trainer.prm import score_steps, train, training_data
from prime_trainer.prm.reference_cache import Reference
from prime_trainer.report.statistics import auc
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs
from prime_trainer.train.nonfinite_guard import TooManySkipped


def rows(count=12, right="\\boxed{5}", wrong="so 2 + 3"):
    """Right responses hold a box and wrong ones do not: something a PRM can learn."""
    return [
        {"prompt": f"What is {k} + 3?", "completions": [right, f"{wrong} {k}", f"{k} is {right}", wrong],
         "correctness": [1, 0, 1, 0]}
        for k in range(count)
    ]  # fmt: skip


@pytest.fixture
def prm_config(run_config, jsonl, tmp_path):
    def make(data=None, **changes):
        changes.setdefault("path", jsonl("train.jsonl", rows() if data is None else data))
        own = {"cache": tmp_path / "cache", "lr": 1e-3, "batch_size": 16, "beta": 0.5, "eval_share": 0.2} | changes
        return run_config(output=tmp_path / own.pop("output", "prm"), train_prm=own)

    return make


def records(cfg):
    return [json.loads(line) for line in (cfg.output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["ce", "dpo", "kto", "nca", "prefix"])
@pytest.mark.parametrize("max_tokens", [40, 10_000])
def test_gradients_are_those_of_the_whole_batch(model_dir, kind, max_tokens):
    """Also where responses of a pair, or of KTO's mean, are in different forward passes."""
    groups = tiny.random_groups(4, 3)
    prm, reference = tiny.load(model_dir), tiny.load(model_dir)
    with torch.no_grad():
        for weight in prm.parameters():
            weight.mul_(1.02)
        (whole,) = Batch(groups).micro_batches(range(4), 10_000)
        batch = Batch(groups)
        ref_logp = log_probs(reference, whole, batch.ids[whole.tokens])
        ref_logp = torch.empty_like(ref_logp).index_put((whole.tokens,), ref_logp)
    labelled = train._Labelled(groups, ref_logp)
    margin = 1.5 if kind == "prefix" else 5.0
    cfg = TrainPRMConfig(kind=kind, beta=0.3, margin=margin)
    values = train._backward_outcomes(prm, labelled, cfg, max_tokens)
    got = [weight.grad.clone() for weight in prm.parameters()]
    prm.zero_grad()
    logp = log_probs(prm, whole, batch.ids[whole.tokens])
    ratio = torch.empty_like(logp).index_put((whole.tokens,), logp) - ref_logp
    options = {"cu_groups": batch.cu_groups, "kind": kind, "beta": 0.3, "margin": margin}
    want = prm_loss(ratio, batch.outcomes, batch.cu_seqlens, **options)
    want.loss.backward()
    assert values["loss"] == pytest.approx(want.loss.item(), abs=1e-5)
    assert values["pair_accuracy"] == pytest.approx(want.pair_accuracy.item(), abs=1e-6)
    for a, b in zip(got, (weight.grad for weight in prm.parameters()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item())


def test_step_labels_are_a_squared_error(prm_config, jsonl, model_dir, tokenizer):
    data = [{"prompt": "2 + 3?", "steps": ["so 2", "is 5", "yes"], "step_labels": [1, 0, None]}]
    path = jsonl("steps.jsonl", [*data, {"prompt": "?", "steps": ["a"], "step_labels": [1]}])
    groups = training_data.step_groups(path, TrainPRMConfig(step_path=path), tokenizer, 500)[:1]
    prm = tiny.load(model_dir)
    (response,) = groups[0].responses
    ref_logp = torch.linspace(-9, 0, len(response.ids))
    loss = train._backward_steps(prm, train._Labelled(groups, ref_logp), TrainPRMConfig(beta=0.1), 1000)
    ids = torch.tensor([groups[0].prompt_ids + response.ids])
    logp = prm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    q = 0.1 * (logp[-len(response.ids) :] - ref_logp)
    first, second = (q[a:b].sum() for a, b in zip(response.cu_steps[:2], response.cu_steps[1:3], strict=True))
    want = ((torch.sigmoid(first) - 1) ** 2 + torch.sigmoid(second) ** 2) / 2
    assert loss == pytest.approx(want.item(), abs=1e-5)
    got = prm.model.norm.weight.grad.clone()
    (wanted,) = torch.autograd.grad(want, prm.model.norm.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5)


def test_auc():
    scores, wanted = torch.tensor([0.1, 0.4, 0.35, 0.8, 0.4]), torch.tensor([False, False, True, True, True])
    # Pairs: 0.35 beats 0.1; 0.8 both; 0.4 beats 0.1 and ties with 0.4.
    assert auc(scores, wanted) == pytest.approx((1 + 2 + 1.5) / 6)
    assert math.isnan(auc(scores, torch.ones(5, dtype=torch.bool)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_starts_at_log_two_exactly(prm_config, dtype):
    """Equal weights, equal layouts: every log-ratio is 0 at the first step, whatever the dtype."""
    cfg = prm_config()
    cfg.model.dtype = dtype
    train.run(cfg)
    assert records(cfg)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_it_learns_and_its_checkpoint_scores(prm_config, tokenizer):
    cfg = prm_config(epochs=6, eval_every=5)
    final = train.run(cfg)
    found = records(cfg)
    assert [row["step"] for row in found if "eval_auc" in row] == [5, 10, 15, 18] and len(found) == 18
    assert found[-1]["eval_pair_accuracy"] > 0.9 and found[-1]["eval_auc"] > 0.9
    assert found[-1]["eval_loss"] < 0.3
    assert found[-1]["lr"] < 0.2e-3 and max(row["lr"] for row in found) == 1e-3
    # An ordinary checkpoint, good for score_steps.
    prm = loading.load_model(ModelConfig(path=str(final), dtype="float32", device="cpu"))
    reference = loading.load_model(cfg.model)
    test = [{"prompt": "What is 20 + 3?", "completions": ["\\boxed{5}", "so 2 + 3 7"]}]
    right, wrong = score_steps(test, prm=prm, reference=reference, tokenizer=tokenizer, beta=0.5)
    assert right.cumulative[-1] > 0 > wrong.cumulative[-1]


def test_what_it_was_trained_as_stands_beside_it(prm_config):
    cfg = prm_config(kind="prefix", beta=None)
    final = train.run(cfg)
    assert json.loads((final / "prm.json").read_text()) == {"kind": "prefix", "beta": 10.0}
    assert prm_record.read(final) == prm_record.Trained("prefix", 10.0)
    saved = cfg.model.model_copy(update={"path": str(final)})
    # A PRM that `rl` does not train is what it was, whatever the loss there would be.
    assert prm_record.files(PRMConfig(update="none"), saved) == {"prm.json": {"kind": "prefix", "beta": 10.0}}
    assert prm_record.files(PRMConfig(update="none"), cfg.model) == {}


def test_prefixes_learn_and_are_judged_by_their_means(prm_config, monkeypatch):
    seen = []
    monkeypatch.setattr(train, "auc", lambda scores, wanted: seen.append(scores) or auc(scores, wanted))
    cfg = prm_config(kind="prefix", beta=10.0, epochs=6, eval_every=0)
    train.run(cfg)
    found = records(cfg)
    assert found[0]["loss"] == pytest.approx(math.log1p(math.exp(5)), abs=1e-5)
    assert found[-1]["eval_pair_accuracy"] > 0.9 and found[-1]["eval_auc"] > 0.9 and found[-1]["eval_loss"] < 2.0
    assert len(seen) == 1 and seen[0].abs().max() < 5  # log-ratios a token, not their sums


def test_step_labels_do_not_go_with_prefixes(tmp_path):
    with pytest.raises(ValidationError, match=r"train_prm\.step_path fits sums of rewards .* got both"):
        TrainPRMConfig(kind="prefix", step_path=tmp_path / "steps.jsonl")


def test_reference_log_probs_are_computed_once(prm_config, monkeypatch, tmp_path, model_dir, prm_dir, tokenizer):
    computed = []
    compute = Reference._compute
    monkeypatch.setattr(Reference, "_compute", lambda *a: computed.append(len(a[2])) or compute(*a))
    train.run(prm_config())
    assert computed == [4, 4, 1, 3]  # 9 prompts to train on, 3 held out
    computed.clear()
    train.run(prm_config(output="again"))
    assert computed == []
    # Other data, another model, another tokenizer: other numbers.
    reference = Reference(ModelConfig(path=str(model_dir), dtype="float32"), tokenizer, tmp_path / "cache", 4096)
    groups = tiny.random_groups(2, 2)
    (one,) = reference.log_probs([groups])
    assert computed == [2]
    (again,) = reference.log_probs([groups])
    assert computed == [2] and torch.equal(one, again)
    reference.log_probs([groups[:1]])
    assert computed == [2, 1]
    Reference(ModelConfig(path=str(model_dir)), tokenizer, tmp_path / "cache", 4096).log_probs([groups])
    Reference(ModelConfig(path=str(prm_dir), dtype="float32"), tokenizer, tmp_path / "cache", 4096).log_probs([groups])
    assert computed == [2, 1, 2, 2]
    moved = tokenizers.load_tokenizer(ModelConfig(path=str(model_dir)))
    moved.chat_template = "x"
    Reference(ModelConfig(path=str(model_dir), dtype="float32"), moved, tmp_path / "cache", 4096).log_probs([groups])
    assert computed == [2, 1, 2, 2, 2]


def test_stage_two_mixes_step_labels_in(prm_config, jsonl):
    steps = [
        {"prompt": f"{k} + 3?", "steps": ["so", f"{k} is 5"], "step_labels": [1, 0]} for k in range(6)
    ]  # fmt: skip
    cfg = prm_config(step_path=jsonl("steps.jsonl", steps), step_batch_size=4, step_coef=2.0, epochs=4)
    train.run(cfg)
    found = records(cfg)
    assert found[0]["step_loss"] == pytest.approx(0.25, abs=1e-6)
    assert found[0]["loss"] == pytest.approx(math.log(2) + 2 * 0.25, abs=1e-6)
    assert found[-1]["step_loss"] < 0.15


def test_resume_goes_on_where_it_was(prm_config, stop_after):
    whole = prm_config(output="whole", epochs=2)
    train.run(whole)

    part = prm_config(output="part", epochs=2)
    with stop_after(2):
        train.run(part)
    assert len(records(part)) == 2
    resumed = part.model_copy(update={"resume": True})
    train.run(resumed)
    keys = ("step", "loss", "lr", "grad_norm")
    assert [[r[k] for k in keys] for r in records(part)] == [[r[k] for k in keys] for r in records(whole)]


def test_a_run_of_nan_ends(prm_config, monkeypatch):
    found = prm_loss
    monkeypatch.setattr(train.pk, "prm_loss", lambda q, *a, **k: found(q * math.nan, *a, **k))
    cfg = prm_config(epochs=2, max_skipped=2)
    with pytest.raises(
        TooManySkipped, match=r"step 2: .* in a row \(train_prm\.max_skipped\).*with a lower train_prm\.lr, or"
    ):
        train.run(cfg)
    assert [row["skipped"] for row in records(cfg)] == [1, 1] and not (cfg.output / "final").exists()


def test_the_reference_must_read_it_too(prm_config, model_dir, tmp_path):
    short = tmp_path / "short"
    shutil.copytree(model_dir, short)
    stored = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(stored | {"max_position_embeddings": 40}))
    data = rows(right="\\boxed{5}" + " so" * 20)
    train.run(prm_config(data))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: .* over the limit of 40 "):
        train.run(prm_config(data, output="other", reference=short))


@pytest.mark.parametrize(
    ("data", "changes", "message"),
    [
        ([{"prompt": "?", "response": "5", "label": 1}] * 3, {}, r"train\.jsonl: every label is above 0.5: .* right"),
        ([{"prompt": "?", "response": "5"}], {}, r"line 1: label is missing"),
        ([{"prompt": "a", "response": "5", "label": 1}, {"prompt": "b", "response": "5", "label": 0}] * 2,
         {"kind": "dpo", "eval_share": 0}, "kind = 'dpo' needs prompts with a right and a wrong response"),
        ([{"prompt": "?", "response": "x " * 600, "label": 1}], {}, r"line 1: .* over the limit of 512 .*too_long"),
        ([{"prompt": "?", "response": "x " * 600, "label": 1}], {"too_long": "skip"}, "all 1 responses .* are longer"),
        ([{"prompt": "?", "steps": ["x", ""], "label": 1}], {}, r"line 1: steps\[1\] must be a non-empty string"),
    ],
)  # fmt: skip
def test_bad_data_is_refused(prm_config, data, changes, message):
    with pytest.raises(ValueError, match=message):
        train.run(prm_config(data, **changes))


def test_path_is_needed(capsys, model_dir):
    assert main(["prm", "--model.path", str(model_dir)]) == 2
    assert "train_prm.path is required" in capsys.readouterr().err
