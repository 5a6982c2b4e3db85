"""What the trainer uses of a causal LM and of a tokenizer; those of transformers fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..scale.sharding import Shardable

Message = dict[str, str]
"""One turn of a chat: `role` and `content`."""


class CausalLM(Shardable, Protocol):
    """A transformers causal LM: a body (`base_model`) that ends in hidden states, and a head over the vocabulary."""

    config: Any
    generation_config: Any

    @property
    def device(self) -> torch.device: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def buffers(self) -> Iterator[Tensor]: ...

    def save_pretrained(
        self, save_directory: str | PathLike[str], *, state_dict: Mapping[str, Tensor] | None = None
    ) -> Any: ...

    def __call__(
        self,
        *,
        input_ids: Tensor,
        attention_mask: Tensor = ...,
        position_ids: Tensor = ...,
        past_key_values: Any = ...,
        use_cache: bool = ...,
        logits_to_keep: int = ...,
    ) -> Any:
        """Returns an output whose `logits` are [b, `logits_to_keep`, V]; `past_key_values` is extended in place."""
        ...


class Tokenizer(Protocol):
    """A transformers tokenizer. `backend_tokenizer` exists only where `is_fast`."""

    eos_token: Any
    eos_token_id: Any
    pad_token_id: Any
    chat_template: Any

    @property
    def is_fast(self) -> bool: ...

    @property
    def backend_tokenizer(self) -> Any: ...

    def __len__(self) -> int: ...

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool) -> Mapping[str, Any]: ...

    def get_vocab(self) -> dict[str, int]: ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str: ...

    def batch_decode(self, sequences: Sequence[Sequence[int]]) -> list[str]: ...

    def apply_chat_template(
        self, conversation: Sequence[Message], *, tokenize: bool, add_generation_prompt: bool
    ) -> str: ...

    def save_pretrained(self, save_directory: str | PathLike[str]) -> Any: ...
