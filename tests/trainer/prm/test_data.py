"""Rows of both data forms become responses in tokens; what is wrong with a row is named with its file and line."""

import json
from pathlib import Path

import pytest

from prime_trainer.data.groups import check_length
from prime_trainer.models.tokenizers import render
from prime_trainer.prm.items import encode, grouped, items_of, read_items

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + 3?"}]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row) + "\n") for row in rows))
    return path


def test_both_forms_and_chats():
    (one,) = items_of({"instruction": "2 + 3?", "response": "5", "label": True, "id": 7}, "x")
    assert (one.messages, one.response, one.label, one.row["id"]) == (CHAT[1:], "5", 1.0, 7)
    row = {"prompt": CHAT, "completions": ["5", "6"], "correctness": [1, 0.25], "finished": [True, False], "id": 7}
    first, second = items_of(row, "x")
    assert first.messages == second.messages == CHAT
    assert (first.response, first.label, first.finished) == ("5", 1.0, True)
    assert (second.response, second.label, second.finished) == ("6", 0.25, False)
    assert second.row == {"prompt": CHAT, "response": "6", "label": 0.25, "finished": False, "completion": 1, "id": 7}
    (chat,) = items_of({"response": [*CHAT, {"role": "assistant", "content": "5"}], "label": 0}, "x")
    assert (chat.messages, chat.response, chat.label) == (CHAT, "5", 0.0)
    (chat,) = items_of({"conversation": [*CHAT, {"role": "assistant", "content": "5"}], "label": 1}, "x")
    assert (chat.messages, chat.response, chat.label) == (CHAT, "5", 1.0)
    (steps,) = items_of({"problem": "2 + 3?", "steps": ["a", "b"], "step_labels": [1, None]}, "x")
    assert (steps.response, steps.parts, steps.step_labels) == ("a\n\nb", ["a\n\n", "b"], [1.0, None])
    (bench,) = items_of({"problem": "?", "steps": ["a"], "final_answer_correct": False, "label": -1}, "x")
    assert bench.label == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"response": "5"}, "a row needs its prompt"),
        ({"prompt": "", "response": "5"}, "prompt must be a non-empty list of messages or a string, got ''"),
        ({"prompt": [{"role": "assistant", "content": "x"}], "response": "5"}, "prompt must end with .* 'user'"),
        ({"prompt": "?", "response": " "}, "response must be a non-empty string"),
        ({"prompt": "?"}, "response must be a non-empty string, got None"),
        (
            {"conversation": CHAT, "label": 1},
            "conversation must end with a message of role 'assistant', got role 'user'",
        ),
        ({"prompt": "?", "response": "5", "label": 2}, "label must be a number from 0 to 1, got 2"),
        ({"prompt": "?", "response": "5", "label": float("nan")}, "label must be a number from 0 to 1, got nan"),
        ({"prompt": "?", "response": "5", "label": "yes"}, "label must be a number from 0 to 1, got 'yes'"),
        ({"prompt": "?", "steps": ["a", ""]}, r"steps\[1\] must be a non-empty string, got ''"),
        ({"prompt": "?", "steps": []}, r"steps must be a non-empty list, got \[\]"),
        ({"prompt": "?", "steps": ["a"], "step_labels": [1, 0]}, "step_labels must be a list of 1 values"),
        ({"prompt": "?", "steps": ["a"], "step_labels": [7]}, r"step_labels\[0\] must be a number from 0 to 1, got 7"),
        ({"prompt": "?", "completions": []}, r"completions must be a non-empty list, got \[\]"),
        ({"prompt": "?", "completions": ["5", "6"], "correctness": [1]}, "correctness must be a list of 2 values"),
        ({"prompt": "?", "completions": ["5", ""]}, r"completions\[1\]: response must be a non-empty string"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", {"prompt": "?", "response": "5"}, row)
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 2: {message}"):
        list(read_items(path, "score.path"))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"score\.path: no such file"):
        list(read_items(tmp_path / "none.jsonl", "score.path"))
    with pytest.raises(ValueError, match=r"score\.path: .*empty\.jsonl has no rows"):
        list(read_items(write(tmp_path / "empty.jsonl"), "score.path"))
    torn = write(tmp_path / "torn.jsonl", {"prompt": "?", "response": "5"}, '{"prompt": "?", "resp')
    items = read_items(torn, "score.path")
    assert next(items).response == "5"
    with pytest.raises(ValueError, match=r"torn\.jsonl, line 2: not JSON: .*\(the last line, .* was cut short\)"):
        next(items)


def test_encode(tokenizer):
    (item,) = items_of({"prompt": "?", "response": "so 2 + 3 = 5\n\nThe answer is \\boxed{5}.", "label": 1}, "x")
    response = encode(tokenizer, item, "blank_line")
    assert response.steps == ["so 2 + 3 = 5\n\n", "The answer is \\boxed{5}."]
    assert response.ids == [*tokenizer.encode(item.response, add_special_tokens=False), tokenizer.eos_token_id]
    assert response.pieces[-1] == tokenizer.eos_token and "".join(response.pieces[:-1]) == item.response
    first, second, end = response.cu_steps
    assert (first, end) == (0, len(response.ids)) and tokenizer.decode(response.ids[:second]) == response.steps[0]
    (cut,) = items_of({"prompt": "?", "response": "so 2", "finished": False}, "x")
    assert encode(tokenizer, cut, "none").ids == tokenizer.encode("so 2", add_special_tokens=False)


def test_length_and_groups(tokenizer):
    items = [item for prompt in ("a", "b", "a") for item in items_of({"prompt": prompt, "response": "5"}, "here")]
    pairs = [(render(tokenizer, item.messages), encode(tokenizer, item, "none")) for item in items]
    groups = grouped(pairs)
    assert [(g.prompt_ids, len(g.responses)) for g in groups] == [(pairs[0][0], 2), (pairs[1][0], 1)]
    length = len(pairs[0][0]) + 2
    check_length("here", *pairs[0], length)
    with pytest.raises(
        ValueError, match=rf"here: prompt and response have {length} tokens, over the limit of {length - 1}"
    ):
        check_length("here", *pairs[0], length - 1)


def test_outcome_labelled_conversations_are_training_data(tokenizer):
    path = Path(__file__).resolve().parents[4] / "shared" / "data" / "outcome_labelled_val.parquet"
    if not path.is_file():
        pytest.skip(f"no such file: {path}")
    items = list(read_items(path, "train_prm.path"))
    assert len(items) == 1086 and sum(item.label for item in items) == 543
    assert all(item.messages[-1]["role"] == "user" and item.response.strip() for item in items)
    groups = grouped((render(tokenizer, item.messages), encode(tokenizer, item, "none")) for item in items[:40])
    assert any(len({response.outcome for response in group.responses}) == 2 for group in groups)
