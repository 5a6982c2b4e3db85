"""Supervised warm-up: only answers count, chat rows are checked, the learning rate rises and falls."""

import json

import pytest
import torch

from prime_trainer import demonstrations, schedule, sft
from prime_trainer.batch import Batch
from prime_trainer.models import render
from prime_trainer.tasks import Problem, load_task


def chat(question="What is 2 + 3?", answer="5"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_only_the_answer_is_learnt(run_config, tokenizer, tmp_path):
    path = write(tmp_path / "chat.jsonl", chat(), "", chat("And 1 + 1?", "2, I think"))
    groups = sft._examples(run_config(sft={"path": path}), tokenizer)
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
    for group in sft._examples(run_config(sft={"path": path}), tokenizer):
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
    with pytest.raises(ValueError, match=r"no SFT example .* fits sft.max_length = 20 tokens \(1 were read\)"):
        sft._examples(run_config(sft={"path": path, "max_length": 20}), tokenizer)


def test_instruction_rows_and_system_prompt(tmp_path, run_config):
    path = write(
        tmp_path / "chat.jsonl",
        {"instruction": "2 + 3?", "response": "5"},
        {"messages": [{"role": "system", "content": "Be brief."}, *chat()["messages"]]},
    )
    user = {"role": "user", "content": "2 + 3?"}
    assert [messages for messages, _ in sft._chat_rows(path)] == [
        [user],
        [{"role": "system", "content": "Be brief."}, *chat()["messages"][:1]],
    ]
    prompt = run_config(sft={"system_prompt": "actions"}).sft.system_prompt
    names = ["ASSESS", "ADVANCE", "VERIFY", "SIMPLIFY", "SYNTHESIZE", "PIVOT", "OUTPUT"]
    assert [name for name in names if f"[{name}]" in prompt] == names and "Next action: [" in prompt
    (first, _), (second, answer) = sft._chat_rows(path, prompt)
    assert first == [{"role": "system", "content": prompt}, user]
    assert second == [{"role": "system", "content": prompt}, *chat()["messages"][:1]] and answer == "5"
    assert run_config(task={"system_prompt": "actions"}).task.system_prompt == prompt


def test_packing_changes_no_number(run_config, tmp_path):
    rows = [chat(f"What is {k} + 3?", "so " * (k % 5) + str(k + 3)) for k in range(9)]
    path = write(tmp_path / "chat.jsonl", *rows)
    losses = []
    for name, pack in (("padded", False), ("packed", True)):
        sft.run(run_config(output=tmp_path / name, sft={"path": path, "batch_size": 9, "epochs": 3, "pack": pack}))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([(json.loads(line)["loss"], json.loads(line)["grad_norm"]) for line in lines])
    for padded, packed in zip(*losses, strict=True):
        assert packed == pytest.approx(padded, rel=1e-4)
    assert losses[0][0][0] > losses[0][2][0]


def test_parquet_chat_data(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([chat(), chat("a", "b")]), tmp_path / "chat.parquet")
    assert list(sft._chat_rows(tmp_path / "chat.parquet")) == [
        ([{"role": "user", "content": "What is 2 + 3?"}], "5"),
        ([{"role": "user", "content": "a"}], "b"),
    ]


def test_schedule():
    values = [schedule.cosine(step, 10, 0.2) for step in range(1, 11)]
    assert values[:2] == [0.5, 1.0]
    assert values[2:] == sorted(values[2:], reverse=True) and 0 < values[-1] < 0.05
    assert schedule.cosine(6, 10, 0.2) == pytest.approx(0.5 * (1 + torch.cos(torch.tensor(4 / 9 * torch.pi)).item()))
    assert schedule.cosine(1, 1, 0.0) == 1.0


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
        demonstrations.worked(Problem("x", [], {"kind": "reasoning_gym", "dataset": "countdown", "entry": {}}))
