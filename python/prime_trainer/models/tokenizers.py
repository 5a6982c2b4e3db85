"""Tokenizers and chat templates."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config.sections import ModelConfig
from .loading import _locate, _quiet
from .model_files import READ_SAFELY, ModelError, reading
from .protocols import CausalLM, Tokenizer

BARE_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(cfg: ModelConfig) -> Tokenizer:
    from transformers import AutoTokenizer

    directory, gguf = _locate(cfg)
    with _quiet(), reading(cfg):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            directory, **({"gguf_file": gguf} if gguf else {}), **READ_SAFELY
        )
    if cfg.chat_template == "bare":
        tokenizer.chat_template = BARE_CHATML
    return tokenizer


@dataclass(frozen=True)
class TokenizerIdentity:
    """All that decides how text becomes ids."""

    vocabulary: dict[str, int]
    rules: str
    """The fast tokenizer's own JSON; empty for a slow one."""
    chat_template: Any
    eos_token: Any

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> TokenizerIdentity:
        rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
        return cls(tokenizer.get_vocab(), rules, tokenizer.chat_template, tokenizer.eos_token)

    def fingerprint(self) -> dict[str, Any]:
        """Short digests, for a checkpoint to compare."""
        vocabulary = sorted(self.vocabulary.items(), key=lambda item: item[1])
        return {
            "size": len(vocabulary),
            "vocabulary": _digest(repr(vocabulary)),
            "rules": _digest(self.rules),
            "chat_template": _digest(str(self.chat_template)),
            "eos_token": self.eos_token,
        }

    def key(self) -> dict[str, Any]:
        """The parts themselves, which JSON can hold, as a key of caches. Raises ModelError for a slow tokenizer."""
        if not self.rules:
            raise ModelError(
                "the tokenizer must be a fast one (tokenizer.json): steps need the places of tokens in the text"
            )
        stored = json.loads(self.rules)
        parts = {name: stored.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
        return parts | {"chat_template": self.chat_template, "eos": self.eos_token}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_same_tokenizer(one: Tokenizer, other: Tokenizer, names: tuple[str, str]) -> None:
    """Raises ModelError unless both give the same ids: log-ratios compare two models token by token."""
    first, second = TokenizerIdentity.of(one), TokenizerIdentity.of(other)
    if first.vocabulary != second.vocabulary:
        for token in sorted(first.vocabulary.keys() | second.vocabulary.keys()):
            a, b = first.vocabulary.get(token, "missing"), second.vocabulary.get(token, "missing")
            if a != b:
                raise ModelError(
                    f"the tokenizers of {names[0]} and {names[1]} differ: token {token!r} is {a} in one, "
                    f"{b} in the other"
                )
    for name in ("model", "normalizer", "pre_tokenizer"):
        if first.key()[name] != second.key()[name]:
            raise ModelError(f"the tokenizers of {names[0]} and {names[1]} differ in their {name}")


def encode_with_spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters each covers."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [(int(start), int(end)) for start, end in found["offset_mapping"]]


def check_chat_template(tokenizer: Tokenizer) -> None:
    if tokenizer.chat_template is None:
        raise ModelError(
            "the tokenizer has no chat template, as those of base models have none: "
            'model.chat_template = "bare" gives it ChatML turns'
        )


def render(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's token ids, up to and with the header of the assistant's turn."""
    check_chat_template(tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def newline_tokens(tokenizer: Tokenizer, vocabulary: int) -> Tensor:
    """bool [`vocabulary`]: the tokens whose text has a line break, which ends a step."""
    texts = tokenizer.batch_decode([[i] for i in range(min(vocabulary, len(tokenizer)))])
    ends = torch.zeros(vocabulary, dtype=torch.bool)
    ends[: len(texts)] = torch.tensor(["\n" in text for text in texts])
    return ends


def stop_ids(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Every id that ends a response: all of the generation config's, and the tokenizer's own."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ModelError("the model names no end-of-sequence token; a response could never end")
    return ids
