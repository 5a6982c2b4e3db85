"""Rewards against plain forward passes, against the EurusPRM card's own numbers, and a file scored in pieces."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import tiny

from prime_trainer.cli import main
from prime_trainer.config.sections import ModelConfig
from prime_trainer.models import loading, tokenizers
from prime_trainer.models.tokenizers import render
from prime_trainer.prm import score_steps
from prime_trainer.prm.step_scorer import StepScorer, means

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden" / "eurusprm_snippet_vectors.json"
ROWS = [
    {"id": k, "prompt": f"What is {k % 3} + 3?", "response": f"so {k % 3} + 3\n\nThe answer{' is' * k} \\boxed{{5}}.",
     "label": k % 2}
    for k in range(7)
]  # fmt: skip


def plain(models_, tokenizer, row, beta):
    """(Q_1, Q_2) from a forward pass of each model over prompt and response alone."""
    prompt = render(tokenizer, [{"role": "user", "content": row["prompt"]}])
    whole = tokenizer.encode(row["response"], add_special_tokens=False)
    ids = torch.tensor([[*prompt, *whole, tokenizer.eos_token_id]])
    q = []
    for model in models_:
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        q.append(logp[len(prompt) - 1 :])
    rewards = beta * (q[0] - q[1])
    (first,) = [n for n in range(len(whole)) if tokenizer.decode(whole[:n]) == row["response"].split("The")[0]]
    return rewards[:first].sum().item(), rewards.sum().item()


@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])
def test_rewards_are_those_of_plain_passes(prm, model, tokenizer, micro_batch_tokens):
    options = {"prm": prm, "reference": model, "tokenizer": tokenizer, "micro_batch_tokens": micro_batch_tokens}
    found = score_steps(ROWS, **options, beta=0.3)
    for row, rewards in zip(ROWS, found, strict=True):
        q1, q2 = plain((prm, model), tokenizer, row, 0.3)
        assert rewards.cumulative == pytest.approx([q1, q2], abs=1e-4)
        assert rewards.single == pytest.approx([q1, q2 - q1], abs=1e-4)
        assert "".join(rewards.steps) == row["response"] == "".join(rewards.tokens[:-1])
        for k in range(2):
            own = rewards.token_rewards[rewards.cu_steps[k] : rewards.cu_steps[k + 1]]
            assert sum(own) == pytest.approx(rewards.single[k], abs=1e-5)
        assert rewards.response() == {
            "min": min(rewards.single), "mean": pytest.approx(q2 / 2, abs=1e-4), "sum": pytest.approx(q2, abs=1e-4),
            "last": rewards.single[1],
        }  # fmt: skip
        assert rewards.response("cumulative")["last"] == rewards.cumulative[1]
    halved = score_steps(ROWS[:1], **options, beta=0.15)
    assert halved[0].cumulative[1] == pytest.approx(found[0].cumulative[1] / 2, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_weights_give_exactly_zero(model_dir, tokenizer, dtype):
    one, other = tiny.load(model_dir, dtype), tiny.load(model_dir, dtype)
    for rewards in score_steps(ROWS, prm=one, reference=other, tokenizer=tokenizer):
        assert set(rewards.token_rewards) == {0.0}


@pytest.fixture
def recorded(prm_dir, tmp_path):
    """The PRM with a record of its training beside it."""

    def make(**record):
        own = tmp_path / "recorded"
        shutil.rmtree(own, ignore_errors=True)
        shutil.copytree(prm_dir, own)
        (own / "prm.json").write_text(json.dumps(record))
        return own

    return make


@pytest.mark.parametrize("micro_batch_tokens", [1, 4096])
def test_means_are_those_of_plain_passes(prm, model, tokenizer, micro_batch_tokens):
    options = {"prm": prm, "reference": model, "tokenizer": tokenizer, "micro_batch_tokens": micro_batch_tokens}
    for row, rewards in zip(ROWS, score_steps(ROWS, **options, beta=3.0, value="mean"), strict=True):
        q1, q2 = plain((prm, model), tokenizer, row, 3.0)
        _, first, tokens = rewards.cu_steps
        assert rewards.value == "mean" and tokens == len(rewards.tokens) > first > 1
        assert rewards.cumulative == pytest.approx([q1 / first, q2 / tokens], abs=1e-4)
        assert rewards.single == pytest.approx([q1 / first, q2 / tokens - q1 / first], abs=1e-4)
        assert sum(rewards.token_rewards) == pytest.approx(q2, abs=1e-3)  # a token has its own reward
        assert rewards.response()["sum"] == pytest.approx(rewards.response("cumulative")["last"])


def test_means_by_hand():
    assert means([4.0, 6.0, -2.0], [0, 2, 3, 8]) == [2.0, 2.0, -0.25]
    assert means([0.0, 3.0], [0, 0, 3]) == [0.0, 1.0]  # an empty step at the start


def test_a_prm_is_scored_as_it_was_trained(recorded, prm, model, tokenizer):
    def found(loaded, **options):
        (rewards,) = score_steps(ROWS[:1], prm=loaded, reference=model, tokenizer=tokenizer, **options)
        return rewards.value, rewards.cumulative

    sums, averages = found(prm, beta=1.0)[1], found(prm, beta=1.0, value="mean")[1]

    def times(beta, values):
        return pytest.approx([beta * value for value in values], rel=1e-4, abs=1e-6)

    assert found(prm) == ("sum", times(0.05, sums))  # nothing is known of it
    assert found(prm, value="mean") == ("mean", times(10.0, averages))
    prefix = tiny.load(recorded(kind="prefix", beta=4.0))
    assert found(prefix) == found(prefix, value="mean") == ("mean", times(4.0, averages))
    assert found(prefix, beta=2.0) == ("mean", times(2.0, averages))
    assert found(prefix, value="sum") == ("sum", times(0.05, sums))  # its beta is one of means
    with pytest.raises(ValueError, match=r"scores by sums, a PRM of kind 'prefix' \(prm.json\) by means"):
        found(prefix, compat="eurus-card")
    with pytest.raises(ValueError, match=r"scores by sums, score\.value by means"):
        found(prm, compat="eurus-card", value="mean")
    assert found(tiny.load(recorded(kind="dpo", beta=0.5))) == ("sum", times(0.5, sums))
    with pytest.raises(ValueError, match=r"prm\.json: kind must be one of ce, .*, got 'ipvrm'"):
        found(tiny.load(recorded(kind="ipvrm", beta=0.5)))
    with pytest.raises(ValueError, match=r"prm\.json: beta must be a number above 0, got 0"):
        found(tiny.load(recorded(kind="ce", beta=0)))


def test_given_steps_and_completions(prm, model, tokenizer):
    options = {"prm": prm, "reference": model, "tokenizer": tokenizer}
    text = "so 2 + 3\n\nThe answer is 5."
    by_splitter, by_hand, whole = score_steps(
        [
            {"prompt": "?", "response": text},
            {"prompt": "?", "steps": text.split("\n\n")},
            {"prompt": "?", "response": text, "finished": False},
        ],
        **options,
    )
    assert by_hand.cumulative == pytest.approx(by_splitter.cumulative, abs=1e-6)
    assert len(whole.tokens) == len(by_hand.tokens) - 1
    assert whole.single[0] == pytest.approx(by_hand.single[0], abs=1e-6) and whole.single[1] != by_hand.single[1]
    several = score_steps([{"prompt": "?", "completions": [text, text + " "]}], **options)
    assert several[0].cumulative == pytest.approx(by_splitter.cumulative, abs=1e-6)


def test_bad_input_is_named(prm, model, tokenizer):
    options = {"prm": prm, "reference": model, "tokenizer": tokenizer}
    with pytest.raises(ValueError, match=r"rows\[1\]: steps\[0\] must be a non-empty string"):
        score_steps([ROWS[0], {"prompt": "?", "steps": [" "]}], **options)
    with pytest.raises(ValueError, match=r"rows\[0\]: prompt and response have \d+ tokens, over the limit of 512"):
        score_steps([{"prompt": "?", "response": "x " * 300}], **options)
    with pytest.raises(ValueError, match="compat must be None or 'eurus-card', got 'card'"):
        score_steps(ROWS, **options, compat="card")
    broken = tiny.load(Path(prm.config._name_or_path))
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match=r"rows\[0\]: the rewards are not finite"):
        score_steps(ROWS, prm=broken, reference=model, tokenizer=tokenizer)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.is_file(), reason="the reference vectors are not beside the repository")
def test_the_card_is_reproduced():
    golden = json.loads(GOLDEN.read_text())
    cfg = ModelConfig(dtype="bfloat16", device="cpu")
    tokenizer, reference = tokenizers.load_tokenizer(cfg), loading.load_model(cfg).float()
    prm = copy.deepcopy(reference)
    with torch.no_grad():
        prm.model.norm.weight.mul_(1.05)
    row = {"prompt": golden["query"], "steps": golden["answer"]}
    options = {"prm": prm, "reference": reference, "tokenizer": tokenizer}
    (card,) = score_steps([row], **options, compat="eurus-card")
    assert card.cumulative == pytest.approx(golden["cumulative_step_rewards"], abs=1e-5)
    assert [golden["step_last_tokens"][0] + at - 2 for at in card.cu_steps[1:]] == golden["step_last_tokens"][1:]
    # The exact boundaries give other numbers: the card's are off by a token or two at every step.
    (exact,) = score_steps([row], **options, beta=0.001)
    assert max(abs(a - b) for a, b in zip(exact.cumulative, card.cumulative, strict=True)) > 1e-5
    assert "".join(exact.steps) == "\n\n".join(golden["answer"])


@pytest.fixture
def score(model_dir, prm_dir, tmp_path):
    def run(path, *words, output="out"):
        base = ["--model.path", str(prm_dir), "--score.reference", str(model_dir), "--score.path", str(path)]
        base += ["--model.dtype", "float32", "--model.device", "cpu", "--output", str(tmp_path / output)]
        return main(["score", *base, "--score.window", "2", *words])

    return run


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_command_resumes_after_any_interruption(score, jsonl, tmp_path, prm, model, tokenizer, capsys):
    path = jsonl("rows.jsonl", ROWS)
    assert score(path) == 0
    out = tmp_path / "out" / "scores.jsonl"
    want, rows = out.read_bytes(), read(out)
    assert [row["id"] for row in rows] == list(range(7)) and rows[0]["benchmark"] == "rows"
    direct = score_steps(ROWS, prm=prm, reference=model, tokenizer=tokenizer)
    for row, rewards in zip(rows, direct, strict=True):
        assert row["rewards"]["single"] == pytest.approx(rewards.single, abs=1e-5)
        assert row["rewards"]["response"]["single"]["min"] == pytest.approx(min(rewards.single), abs=1e-5)
    assert score(path) == 2 and "already exists" in capsys.readouterr().err
    # Killed in the middle of the fifth row.
    lines = want.splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert score(path, "--resume") == 0
    assert [row["id"] for row in read(out)] == list(range(7))
    for again, before in zip(read(out), rows, strict=True):
        assert again["rewards"]["cumulative"] == pytest.approx(before["rewards"]["cumulative"], abs=1e-5)
    assert score(path, "--resume", "--score.beta", "1") == 2
    assert "the configuration has changed (beta: None -> 1.0)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "change"), [(0, {"prompt": "And 1 + 1?"}), (3, {"label": 0}), (1, {"benchmark": "other"})]
)
def test_scores_of_other_rows_are_not_gone_on_with(score, jsonl, tmp_path, capsys, changed, change):
    """Not only the last of them counts."""
    path = jsonl("rows.jsonl", ROWS)
    assert score(path) == 0
    out = tmp_path / "out" / "scores.jsonl"
    four = out.read_bytes().splitlines(keepends=True)[:4]
    out.write_bytes(b"".join(four))
    jsonl("rows.jsonl", [row | change if k == changed else row for k, row in enumerate(ROWS)])
    assert score(path, "--resume") == 2
    assert f"row {changed + 1} of {out} is not response {changed + 1}" in capsys.readouterr().err
    jsonl("rows.jsonl", ROWS[:3])
    assert score(path, "--resume") == 2 and "is not response 4 of score.path" in capsys.readouterr().err
    assert out.read_bytes() == b"".join(four)
    # What is not scored yet may change: a bad row that has been mended.
    jsonl("rows.jsonl", [*ROWS[:5], ROWS[6]])
    assert score(path, "--resume") == 0 and [row["id"] for row in read(out)] == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("key", ["model.path", "score.reference"])
def test_scores_of_another_model_are_not_gone_on_with(score, jsonl, tmp_path, model_dir, prm_dir, capsys, key):
    """One that was trained anew in its place has the same path."""
    own = tmp_path / "own"
    shutil.copytree({"model.path": prm_dir, "score.reference": model_dir}[key], own)
    path = jsonl("rows.jsonl", ROWS)
    assert score(path, f"--{key}", str(own)) == 0
    out = tmp_path / "out" / "scores.jsonl"
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:4]))
    other = tiny.load(own)
    with torch.no_grad():
        other.model.norm.weight.mul_(1.5)
    loading.save(other, tokenizers.load_tokenizer(ModelConfig(path=str(own))), own)
    assert score(path, "--resume", f"--{key}", str(own)) == 2
    assert f"not what the scores there are from: {key} has changed since" in capsys.readouterr().err
    assert len(read(out)) == 4
    (tmp_path / "out" / "fingerprints.json").unlink()
    assert score(path, "--resume", f"--{key}", str(own)) == 2
    assert "fingerprints.json is missing" in capsys.readouterr().err


def test_means_are_written_and_not_gone_on_with_as_sums(score, recorded, jsonl, tmp_path, capsys):
    own, path, out = recorded(kind="prefix", beta=4.0), jsonl("rows.jsonl", ROWS), tmp_path / "out" / "scores.jsonl"
    assert score(path, "--model.path", str(own)) == 0
    for row in read(out):
        rewards = row["rewards"]
        assert rewards["value"] == "mean"
        so_far = [sum(rewards["token_rewards"][:end]) / end for end in rewards["cu_steps"][1:]]
        assert rewards["cumulative"] == pytest.approx(so_far, abs=1e-5)
        assert rewards["response"]["single"]["last"] == pytest.approx(so_far[1] - so_far[0], abs=1e-5)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "The curve is Q, the mean of rewards" in page and "<span>mean " in page and "<span>sum " not in page
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:4]))
    assert score(path, "--model.path", str(own), "--resume", "--score.value", "sum") == 2
    assert "the configuration has changed (value: None -> sum)" in capsys.readouterr().err
    (own / "prm.json").unlink()
    assert score(path, "--model.path", str(own), "--resume") == 2
    assert "prm.json of model.path has changed since" in capsys.readouterr().err
    assert score(path, "--model.path", str(own), "--score.value", "mean", "--score.beta", "4", output="given") == 0
    given = read(tmp_path / "given" / "scores.jsonl")
    assert [row["rewards"] for row in read(out)] == [row["rewards"] for row in given[:4]]


@pytest.fixture
def overflowing(tokenizer, monkeypatch):
    """A pass with a response that has a '?' overflows, for all that share it."""
    (marker,) = tokenizer.encode("?", add_special_tokens=False)
    found = StepScorer._log_ratio

    def log_ratio(self, micro, ids):
        return found(self, micro, ids) * (math.nan if (ids == marker).any() else 1.0)

    monkeypatch.setattr(StepScorer, "_log_ratio", log_ratio)


def test_one_response_that_overflows_costs_no_other(score, jsonl, tmp_path, capsys, overflowing, prm, model, tokenizer):
    rows = [{"id": k, "prompt": "2 + 3", "response": "5?" if k == 1 else f"so {k}\n\n5"} for k in range(6)]
    path = jsonl("rows.jsonl", rows)
    assert score(path, "--score.window", "4") == 2
    said = capsys.readouterr().err
    assert "rows.jsonl, line 2: the rewards are not finite" in said and "--resume goes on after it" in said
    out = tmp_path / "out" / "scores.jsonl"
    assert [row["id"] for row in read(out)] == [0, 1, 2, 3]  # its whole window
    assert score(path, "--resume") == 0
    found = read(out)
    assert [row["id"] for row in found] == list(range(6))
    assert found[1]["rewards"] is None and "line 2: the rewards are not finite" in found[1]["error"]
    del found[1], rows[1]
    for row, want in zip(found, score_steps(rows, prm=prm, reference=model, tokenizer=tokenizer), strict=True):
        assert row["rewards"]["cumulative"] == pytest.approx(want.cumulative, abs=1e-5)


def test_what_came_before_a_bad_row_is_kept(score, jsonl, tmp_path, capsys):
    path = jsonl("rows.jsonl", ROWS[:3])
    with path.open("a") as file:
        file.write(json.dumps(ROWS[3])[:20])
    assert score(path) == 2
    assert "rows.jsonl, line 4: not JSON" in capsys.readouterr().err
    out = tmp_path / "out" / "scores.jsonl"
    assert [row["id"] for row in read(out)] == [0, 1, 2]
    jsonl("rows.jsonl", ROWS)  # mended
    assert score(path, "--resume") == 0 and [row["id"] for row in read(out)] == list(range(7))


def test_long_responses(score, jsonl, tmp_path, capsys):
    path = jsonl("rows.jsonl", [ROWS[0], ROWS[1] | {"response": "x " * 300}, ROWS[2]])
    assert score(path) == 2
    assert "rows.jsonl, line 2: prompt and response have" in capsys.readouterr().err
    assert [row["id"] for row in read(tmp_path / "out" / "scores.jsonl")] == [0]
    assert score(path, "--score.too_long", "skip", output="skip") == 0
    first, second, third = read(tmp_path / "skip" / "scores.jsonl")
    assert second["rewards"] is None and "over the limit" in second["error"]
    assert first["rewards"] and third["rewards"]


def test_models_that_do_not_fit_are_named(score, jsonl, tmp_path, model_dir, prm_dir, capsys):
    path = jsonl("rows.jsonl", ROWS)
    other = tmp_path / "other"
    shutil.copytree(model_dir, other)
    stored = json.loads((other / "tokenizer.json").read_text())
    vocabulary = stored["model"]["vocab"]
    a, b = list(vocabulary)[5:7]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(stored))
    assert score(path, "--score.reference", str(other)) == 2
    message = capsys.readouterr().err
    assert "the tokenizers of model.path and score.reference differ: token" in message
    sick = tmp_path / "sick"
    model = tiny.load(prm_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 3] = math.nan
    loading.save(model, tokenizers.load_tokenizer(ModelConfig(path=str(prm_dir))), sick)
    assert score(path, "--model.path", str(sick)) == 2
    message = capsys.readouterr().err
    assert "1 of the 8192 values of model.layers.1.mlp.up_proj.weight are not finite" in message
