"""Forward passes of a causal LM without its head, and what a model can read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from torch import Tensor

from . import traits
from .attention.segments import Segments
from .protocols import CausalLM
from .traits import positions

SIZES = {"cpu": 8}
"""By device, how many lengths of passes there are between a power of two and the next.

On CPUs oneDNN compiles a 16-bit product for each of its shapes; see `compiled_products`.
"""


@overload
def length_limit(models: Iterable[CausalLM], max_length: int) -> int: ...
@overload
def length_limit(models: Iterable[CausalLM], max_length: int | None) -> int | None: ...
def length_limit(models: Iterable[CausalLM], max_length: int | None) -> int | None:
    """The longest sequence that all `models` can read, at most `max_length`; None where nothing says."""
    limits = [max_length, *map(positions, models)]
    return min((limit for limit in limits if limit is not None), default=None)


def new_cache(model: CausalLM) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def hidden_states(
    model: CausalLM, input_ids: Tensor, position_ids: Tensor | None, attention_mask: Segments | Tensor | None
) -> Tensor:
    """Last hidden states [b, L, H]. `attention_mask` is None (causal), what a row consists of, or bool [b, 1, L, L],
    true where a token sees.

    Without `position_ids` they are the model's own, 0 to L - 1 in most.
    """
    masks = None if attention_mask is None else traits.of(model).masks
    return traits.hidden_states(model, input_ids, position_ids, attention_mask, masks)


def filled(length: int, device_type: str) -> int:
    """What a pass of `length` tokens is filled up to, for products to have few shapes: at most an eighth more."""
    count = SIZES.get(device_type)
    apart = 1 if count is None else max(1, 2 ** (length.bit_length() - 1) // count)
    return -(-length // apart) * apart
