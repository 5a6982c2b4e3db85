r"""The task and the model of the study: chains of additions and subtractions, and a small transformer of characters.

usage: python bench/study/chains.py FOLDER

A question is a starting number and some one-digit terms, `63-8+5`; its worked solution has one line a term and the
answer in a box: `63-8=55`, `55+5=60`, `\boxed{60}`. All running totals lie from 0 to 99. The demonstrations of the
warm-up slip where a ten is crossed: additions forget the carry (`47+5=42`), subtractions end one too high (`63-8=56`),
with the chances of `SLIPS`, and go on from the wrong total. A model that imitates them knows both ways to write such a
line and errs at single lines. A solution is right only if each of its lines is, but where ten slips of one kind undo
one of the other.

FOLDER gets train.jsonl and held_out.jsonl (problems), worked.jsonl (demonstrations, of other questions) and untrained,
a model directory with weights as they are drawn.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

TERMS = (6, 8)
"""Fewest and most lines of a solution."""
PROBLEMS, HELD_OUT, WORKED = 20_000, 400, 51_200
SLIPS = {"+": 0.6, "-": 0.4}
"""Of the demonstrations' additions and subtractions that cross a ten, how many go wrong. Slips that undo each other one
to one (ten too low, ten too high) would leave an outcome that says next to nothing of the lines."""
SEED = 0
_LINE = re.compile(r"(?P<total>\d+)(?P<sign>[+-])(?P<term>\d)=\d+")
CHARACTERS = "0123456789+-=?\n"


def question(rng: random.Random) -> str:
    total = rng.randint(0, 99)
    text = str(total)
    for _ in range(rng.randint(*TERMS)):
        term = rng.choice([each for each in range(-9, 10) if each and 0 <= total + each <= 99])
        total += term
        text += f"{term:+d}"
    return text


def solution(text: str) -> list[str]:
    """The lines of the worked solution of a question, the box last."""
    signs = [k for k, character in enumerate(text) if character in "+-"]
    total = int(text[: signs[0]])
    lines = []
    for begin, end in zip(signs, [*signs[1:], len(text)], strict=True):
        before, total = total, total + int(text[begin:end])
        lines.append(f"{before}{text[begin:end]}={total}")
    return [*lines, rf"\boxed{{{total}}}"]


def demonstration(text: str, rng: random.Random) -> list[str]:
    """As `solution`, with slips. A question on which a slip leads out of 0 to 99 has another try."""
    while True:
        lines, total = [], None
        for line in solution(text)[:-1]:
            match = _LINE.fullmatch(line)
            assert match is not None
            before = int(match["total"]) if total is None else total
            sign, term = match["sign"], int(match["term"])
            change = term if sign == "+" else -term
            total = before + change
            if total // 10 != before // 10 and rng.random() < SLIPS[sign]:
                total += -10 if sign == "+" else 1
            lines.append(f"{before}{sign}{term}={total}")
            if not 0 <= total <= 99:
                break
        else:
            return [*lines, rf"\boxed{{{total}}}"]


def first_wrong_line(text: str, lines: Sequence[str]) -> int | None:
    """The first line of an answer to a question that differs from the worked solution; None where none does."""
    right = solution(text)
    wrong = (k for k, line in enumerate(lines) if k >= len(right) or line.strip() != right[k])
    return next(wrong, None)


def questions(seed: int) -> Iterator[str]:
    """All different."""
    rng, seen = random.Random(seed), set()
    while True:
        text = question(rng)
        if text not in seen:
            seen.add(text)
            yield text


def write_data(folder: Path) -> None:
    stream = questions(SEED)
    for name, count in (("held_out", HELD_OUT), ("train", PROBLEMS)):
        rows = [{"question": text, "answer": solution(text)[-1][7:-1]} for text in islice(stream, count)]
        _write(folder / f"{name}.jsonl", rows)
    rng = random.Random(SEED)
    worked = [{"instruction": text, "response": "\n".join(demonstration(text, rng))} for text in islice(stream, WORKED)]
    _write(folder / "worked.jsonl", worked)


def write_model(folder: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    pieces = ["<|end|>", *CHARACTERS, "\\boxed{", "}"]
    rules = Tokenizer(models.WordLevel({piece: k for k, piece in enumerate(pieces)}))
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|[\s\S]"), "isolated")
    rules.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '?' }}{% endfor %}"
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(pieces), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    ))  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder)
    write_model(folder / "untrained")


def _write(path: Path, rows: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
