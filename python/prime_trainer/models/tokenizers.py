"""Tokenizers and chat templates."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..config.sections import ModelConfig
from .loading import ModelError, _locate, _quiet
from .protocols import CausalLM, Tokenizer

BARE_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def load_tokenizer(cfg: ModelConfig) -> Tokenizer:
    from transformers import AutoTokenizer

    directory, gguf = _locate(cfg)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(directory, **({"gguf_file": gguf} if gguf else {}))
    if cfg.chat_template == "bare":
        tokenizer.chat_template = BARE_CHATML
    return tokenizer


def tokenizer_fingerprint(tokenizer: Tokenizer) -> dict[str, Any]:
    """What tells one tokenizer from another, for a checkpoint to compare."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return {
        "size": len(vocabulary),
        "vocabulary": digest(repr(vocabulary)),
        "rules": digest(rules),
        "chat_template": digest(str(tokenizer.chat_template)),
        "eos_token": tokenizer.eos_token,
    }


def tokenizer_parts(tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides how text becomes ids, comparable and hashable as JSON."""
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer must be a fast one (tokenizer.json): steps need the places of tokens in the text"
        )
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: stored.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return parts | {"chat_template": tokenizer.chat_template, "eos": tokenizer.eos_token}


def check_same_tokenizer(one: Tokenizer, other: Tokenizer, names: tuple[str, str]) -> None:
    """Log-ratios compare token by token: both models must have been given the same ids."""
    first, second = one.get_vocab(), other.get_vocab()
    if first != second:
        for token in sorted(first.keys() | second.keys()):
            if first.get(token) != second.get(token):
                raise ModelError(
                    f"the tokenizers of {names[0]} and {names[1]} differ: token {token!r} is "
                    f"{first.get(token, 'missing')} in one, {second.get(token, 'missing')} in the other"
                )
    a, b = tokenizer_parts(one), tokenizer_parts(other)
    for name in ("model", "normalizer", "pre_tokenizer"):
        if a[name] != b[name]:
            raise ModelError(f"the tokenizers of {names[0]} and {names[1]} differ in their {name}")


def encode_with_spans(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters each covers."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [(int(start), int(end)) for start, end in found["offset_mapping"]]


def render(tokenizer: Tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's token ids, up to and with the header of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def stop_ids(model: CausalLM, tokenizer: Tokenizer) -> list[int]:
    """Every id that ends a response: all of the generation config's, and the tokenizer's own."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ModelError("the model names no end-of-sequence token; a response could never end")
    return ids
