"""Supervised warm-up: only answers count, chat rows are checked, the learning rate rises and falls."""

import itertools
import json
import math

import pytest
import torch
from helpers import tiny
from helpers.checkpoints import load_latest

import prime_kernels as pk
from prime_trainer import sft
from prime_trainer.data import demonstrations
from prime_trainer.data.problems import Problem
from prime_trainer.data.tasks import load_task
from prime_trainer.models import traits
from prime_trainer.models.tokenizers import render
from prime_trainer.train import supervised_loop
from prime_trainer.train.batch import Batch
from prime_trainer.train.nonfinite_guard import TooManySkipped
from prime_trainer.verify.answers import GymAnswer


def chat(question="What is 2 + 3?", answer="5"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def records(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_only_the_answer_is_learnt(run_config, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", chat(), "", chat("And 1 + 1?", "2, I think"))
    groups = sft._examples(run_config(sft={"path": path}), tokenizer, 1024)
    texts = [tokenizer.decode(r.ids) for g in groups for r in g.responses]
    assert texts == ["5<|im_end|>", "2, I think<|im_end|>"]
    assert groups[0].prompt_ids == render(tokenizer, chat()["messages"][:1])
    assert tokenizer.decode(groups[0].prompt_ids).endswith("<|im_start|>assistant\n")
    assert Batch(groups).num_tokens == sum(len(tokenizer.encode(t)) for t in texts)


def test_loss_is_the_mean_over_answer_tokens(run_config, model, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", chat(), chat("And 1 + 1?", "2, I think"), chat("3?", "3"))
    sft.run(run_config(sft={"path": path, "batch_size": 3}, micro_batch_tokens=1))
    (row,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    total, count = 0.0, 0
    for group in sft._examples(run_config(sft={"path": path}), tokenizer, 1024):
        ids, at = torch.tensor([group.prompt_ids + group.responses[0].ids]), len(group.prompt_ids)
        with torch.no_grad():
            logp = model(input_ids=ids).logits[0].log_softmax(-1)
        total -= logp[at - 1 : -1].gather(1, ids[0, at:, None]).sum().item()
        count += ids.shape[1] - at
    assert row["loss"] == pytest.approx(total / count, abs=1e-5) and row["tokens"] == count


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "has no rows"),
        ([chat(), {"text": "x"}], "line 2: messages must be a non-empty list of messages, got None"),
        ([{"messages": chat()["messages"][:1]}], "line 1: messages must end with a message of role 'assistant'"),
        ([{"messages": chat()["messages"][1:]}], "line 1: messages must have a turn before the assistant's"),
        ([{"messages": "hello"}], "line 1: messages must be a non-empty list"),
        ([{"messages": ["hello", "there"]}], r"line 1: messages\[0\] must be a message with role and content"),
        ([{"messages": [{"role": "user", "content": None}]}], r"line 1: messages\[0\]\.content must be a non-empty"),
        ([{"instruction": "2 + 3?"}], r"line 1: response\.content must be a non-empty string, got None"),
        (
            [{"instruction": "", "response": "5"}],
            "line 1: instruction must be a non-empty list of messages or a string",
        ),
        ([chat(), "{not json"], "line 2: not JSON"),
        ([chat(), "[1]"], "line 2: expected an object, got list"),
    ],
)
def test_bad_chat_rows_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        list(sft._chat_rows(write(tmp_path / "chat.jsonl", *lines)))


def test_bad_files_are_named(run_config, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sft\.path: no such file"):
        list(sft._chat_rows(tmp_path / "none.jsonl"))
    torn = tmp_path / "chat.parquet"
    torn.write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"chat\.parquet is not a parquet file"):
        list(sft._chat_rows(torn))
    path = write(tmp_path / "chat.jsonl", chat(answer="5 " * 200))
    with pytest.raises(
        ValueError, match=r"sft\.max_length: all 1 examples from .*chat\.jsonl are longer than 20 tokens"
    ):
        sft._examples(run_config(sft={"path": path, "too_long": "skip"}), tokenizer, 20)


def test_examples_that_are_too_long(run_config, tokenizer, tmp_path, capsys):
    path = write(tmp_path / "chat.jsonl", chat(), chat(answer="5 " * 600), chat("And 1 + 1?", "2"))
    # The tiny model has 512 positions, below the 1024 of sft.max_length.
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 2: .* over the limit of 512 \(sft\.too_long = 'skip'"):
        sft.run(run_config(sft={"path": path}))
    sft.run(run_config(sft={"path": path, "too_long": "skip"}))
    assert f"sft: 1 of 3 examples from {path} are longer than 512 tokens and left out" in capsys.readouterr().out
    (row,) = records(tmp_path / "run")
    assert row["tokens"] == len(tokenizer.encode("5<|im_end|>2<|im_end|>"))
    with pytest.raises(ValueError, match=r"demonstration 1: .* over the limit of 20 "):
        sft.run(run_config(output=tmp_path / "made", sft={"max_length": 20}))


def test_instruction_rows_and_system_prompt(tmp_path, run_config):
    path = write(
        tmp_path / "chat.jsonl",
        {"instruction": "2 + 3?", "response": "5"},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat()["messages"]]},
    )
    user = {"role": "user", "content": "2 + 3?"}
    assert [messages for _, messages, _ in sft._chat_rows(path)] == [
        [user],
        [{"role": "system", "content": "Be brief."}, *chat()["messages"][:1]],
    ]
    prompt = run_config(sft={"system_prompt": "actions"}).sft.system_prompt
    names = ["ASSESS", "ADVANCE", "VERIFY", "SIMPLIFY", "SYNTHESIZE", "PIVOT", "OUTPUT"]
    assert [name for name in names if f"[{name}]" in prompt] == names and "Next action: [" in prompt
    (_, first, _), (_, second, answer) = sft._chat_rows(path, prompt)
    assert first == [{"role": "system", "content": prompt}, user]
    assert second == [{"role": "system", "content": prompt}, *chat()["messages"][:1]] and answer == "5"
    assert run_config(task={"system_prompt": "actions"}).task.system_prompt == prompt


def test_layouts_change_no_number(run_config, tmp_path, monkeypatch):
    rows = [chat(f"What is {k} + 3?", "so " * (k % 5) + str(k + 3)) for k in range(9)]
    path = write(tmp_path / "chat.jsonl", *rows)
    losses = []
    for layout in ("rows", "shared"):
        monkeypatch.setattr(traits, "layout_of", lambda models: layout)  # noqa: B023
        sft.run(run_config(output=tmp_path / layout, sft={"path": path, "batch_size": 9, "epochs": 3}))
        lines = (tmp_path / layout / "metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    for padded, packed in zip(*losses, strict=True):
        assert packed == pytest.approx(padded, rel=1e-4)
    assert losses[0][0][0] > losses[0][2][0]


def test_parquet_chat_data(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat(), chat("a", "b")]), tmp_path / "chat.parquet")
    assert list(sft._chat_rows(tmp_path / "chat.parquet")) == [
        (f"{tmp_path}/chat.parquet, row 1", [{"role": "user", "content": "What is 2 + 3?"}], "5"),
        (f"{tmp_path}/chat.parquet, row 2", [{"role": "user", "content": "a"}], "b"),
    ]


def test_schedule():
    values = [supervised_loop.cosine(step, 10, 0.2) for step in range(1, 11)]
    assert values[:2] == [0.5, 1.0]
    assert values[2:] == sorted(values[2:], reverse=True) and 0 < values[-1] < 0.05
    assert supervised_loop.cosine(6, 10, 0.2) == pytest.approx(
        0.5 * (1 + torch.cos(torch.tensor(4 / 9 * torch.pi)).item())
    )
    assert supervised_loop.cosine(1, 1, 0.0) == 1.0


def test_resume_gives_the_same_weights(run_config, tmp_path, stop_after, model):
    def config(name, **changes):
        return run_config(output=tmp_path / name, sft={"epochs": 2, "batch_size": 5}, **changes)

    whole = sft.run(config("whole"))
    with stop_after(4):  # of 2 x 3, so in the second epoch
        sft.run(config("part"))
    assert [row["step"] for row in records(tmp_path / "part")] == [1, 2, 3, 4]
    final = sft.run(config("part", resume=True))
    keys = ("step", "loss", "lr", "grad_norm")
    part, all_at_once = ([[row[k] for k in keys] for row in records(tmp_path / name)] for name in ("part", "whole"))
    assert part == all_at_once and len(part) == 6
    got, want, before = tiny.load(final).state_dict(), tiny.load(whole).state_dict(), model.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    assert not any(torch.equal(before[name], want[name]) for name in want)


@pytest.fixture
def nan_at(monkeypatch):
    """`nan_at(2, 3)`: the second and third forward pass have no finite gradients."""

    def patch(*passes):
        found, count = pk.linear_nll, itertools.count(1)
        monkeypatch.setattr(
            sft.pk, "linear_nll", lambda *a, **k: found(*a, **k) * (math.nan if next(count) in passes else 1)
        )

    return patch


def test_a_step_of_nan_is_skipped_and_counted(run_config, nan_at, capsys):
    nan_at(2)
    cfg = run_config()
    final = sft.run(cfg)
    assert [row["skipped"] for row in records(cfg.output)] == [0, 1, 0] and final.is_dir()
    assert "sft: 1 of 3 steps had no finite gradient and were skipped" in capsys.readouterr().out


def test_a_run_of_nan_ends(run_config, nan_at):
    nan_at(*range(2, 99))
    cfg = run_config(sft={"epochs": 2, "max_skipped": 2})
    with pytest.raises(
        TooManySkipped, match=r"step 3: .* 2 steps in a row \(sft\.max_skipped\).*with a lower sft\.lr, or"
    ):
        sft.run(cfg)
    assert [row["skipped"] for row in records(cfg.output)] == [0, 1, 1] and not (cfg.output / "final").exists()
    assert load_latest(cfg.output)["skips"] == {"total": 2, "in_row": 2}
    with pytest.raises(TooManySkipped, match=r"step 4: .* 3 steps in a row"):
        sft.run(cfg.model_copy(update={"resume": True}))


def test_a_run_shorter_than_the_limit_ends_too(run_config, nan_at):
    nan_at(*range(1, 99))
    cfg = run_config(sft={"batch_size": 12})
    with pytest.raises(TooManySkipped, match="step 1: "):
        sft.run(cfg)
    with pytest.raises(TooManySkipped, match="step 1: "):
        sft.run(cfg.model_copy(update={"resume": True}))
    assert not (cfg.output / "final").exists()


def test_an_existing_run_is_not_overwritten(run_config):
    sft.run(run_config())
    with pytest.raises(ValueError, match="already holds a run"):
        sft.run(run_config())


def test_worked_solutions_are_right(run_config):
    task = load_task(run_config(task={"params": {"min_terms": 3, "max_terms": 4}}).task, 0)
    for problem, answer in demonstrations.make(task, 20, 1.0, 0):
        *steps, box = answer.splitlines()
        assert box == rf"\boxed{{{problem.reference}}}" and steps[-1].endswith(f"= {problem.reference}")
        for step in steps:
            left, right = step.split(" = ")
            before, sign, term = left.split(" ")
            assert int(before) + int(sign + term) == int(right)
    assert [a for _, a in demonstrations.make(task, 3, 0.0, 0)] == [
        rf"\boxed{{{p.reference}}}" for p in task.train(0, 3)
    ]
    with pytest.raises(ValueError, match="no worked solutions can be made for 'countdown'"):
        demonstrations.worked(Problem("x", [], GymAnswer("countdown", {})))


def test_killed_before_its_first_checkpoint_a_stage_logs_every_step_once(run_config, tmp_path):
    cfg = run_config(sft={"demonstrations": 8, "batch_size": 4})
    sft.run(cfg)
    assert not (tmp_path / "run" / "checkpoints").exists()
    sft.run(cfg.model_copy(update={"resume": True}))
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
