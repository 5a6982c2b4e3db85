"""Steps: where text is cut, and which tokens belong to which step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prime_trainer.models import tokenizers
from prime_trainer.prm import steps


@pytest.mark.parametrize(
    ("how", "text", "parts"),
    [
        ("blank_line", "a\nb\n\nc\n \n\nd\n", ["a\nb\n\n", "c\n \n\n", "d\n"]),
        ("blank_line", "\n\na\n\n", ["\n\na\n\n"]),
        ("line", "1 + 2 = 3\n3 + 4 = 7\n\n\\boxed{7}", ["1 + 2 = 3\n", "3 + 4 = 7\n\n", "\\boxed{7}"]),
        ("numbered", "So.\nStep 1: a\nsee step 3\n**Step 2:** b\n## Step 3. c", [
            "So.\n", "Step 1: a\nsee step 3\n", "**Step 2:** b\n", "## Step 3. c"]),
        ("numbered", "  \nStep 1: a", ["  \nStep 1: a"]),
        ("action", "[ASSESS]\n# x\nNext action: [ADVANCE]\n\n[ADVANCE]\n# y", [
            "[ASSESS]\n# x\nNext action: [ADVANCE]\n\n", "[ADVANCE]\n# y"]),
        ("action", "[NOTE] x", ["[NOTE] x"]),
        ("none", "a\n\nb", ["a\n\nb"]),
        ("line", "   ", ["   "]),
    ],
)  # fmt: skip
def test_split(how, text, parts):
    assert steps.split(text, how) == parts


def test_unknown_splitter():
    with pytest.raises(ValueError, match="splitter must be one of blank_line, line, numbered, action, none, got 'x'"):
        steps.split("a", "x")


@given(st.text(alphabet="ab \n[STEP]1:é", max_size=40), st.sampled_from(["blank_line", "line", "numbered", "action"]))
def test_parts_are_the_text_and_none_is_blank(text, how):
    parts = steps.split(text, how)
    assert "".join(parts) == text
    assert all(part.strip() for part in parts) or len(parts) <= 1


def test_given_steps():
    assert steps.joined(["a", "b"]) == ["a\n\n", "b"]
    with pytest.raises(ValueError, match=r"steps\[1\] must be a non-empty string, got ' '"):
        steps.joined(["a", " "])


def test_tokens_go_to_the_step_of_their_first_ink():
    # "a." "\n\n" " b" "\n" "c", the third with the space of the next step or, untrimmed, from the one before.
    parts = ["a.\n\n ", "b\n", "c"]
    assert steps.token_counts(parts, [(0, 2), (2, 4), (4, 6), (6, 7), (7, 8)]) == [2, 2, 1]
    assert steps.token_counts(parts, [(0, 4), (5, 7), (7, 8)]) == [1, 1, 1]
    assert steps.token_counts(["a", "b", "c"], [(0, 2), (2, 3)]) == [1, 0, 1]
    assert steps.without_empty(["a", "b", "c"], [1, 0, 1]) == (["ab", "c"], [1, 1])
    assert steps.without_empty(["a", "b"], [0, 1]) == (["ab"], [1])


def test_counts_with_a_tokenizer(tokenizer):
    parts = ["so 2 + 3 = 5\n\n", "häß 🙂 5\n\n", "\\boxed{5}"]
    ids, spans = tokenizers.encode_with_spans(tokenizer, "".join(parts))
    counts = steps.token_counts(parts, spans)
    assert sum(counts) == len(ids) and min(counts) > 0
    # Decoding the tokens of a step gives the step.
    at = 0
    for part, count in zip(parts, counts, strict=True):
        assert tokenizer.decode(ids[at : at + count]) == part
        at += count
