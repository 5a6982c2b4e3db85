"""The arithmetic of the EurusPRM-Stage2 card's scoring snippet, to reproduce the card's numbers.

It scores the rendered chat, assistant's turn included. Step k ends where a chat of its first k steps would, less two
tokens, and each prefix is encoded again; so steps start one token before the response's first and take the first tokens
of the next. Tokens equal to the pad token are masked out of the attention wherever they stand. We reproduce the
indices and the mask; the exact boundaries are in items.py.
"""

from __future__ import annotations

import dataclasses

import torch

from ..config.sections import Splitter
from ..models import tokenizers
from ..models.protocols import Tokenizer
from ..train.batch import Micro
from .items import Item, StepResponse
from .steps import split

CARD_BETA = 0.001


def encode_card(tokenizer: Tokenizer, item: Item, splitter: Splitter) -> tuple[list[int], StepResponse]:
    """(ids before the first reward, the rest with its steps): a token's reward counts from index `last[0]` on."""
    tokenizers.check_chat_template(tokenizer)
    given = item.row.get("steps") if item.parts is not None else None
    steps = list(given) if given is not None else [part.strip() for part in split(item.response, splitter)]

    def render(count: int) -> str:
        answer = {"role": "assistant", "content": "\n\n".join(steps[:count])}
        return tokenizer.apply_chat_template([*item.messages, answer], tokenize=False, add_generation_prompt=False)

    ids = tokenizer.encode(render(len(steps)), add_special_tokens=False)
    last = []
    for count in range(len(steps) + 1):
        text = render(count).strip() + ("\n\n" if 0 < count < len(steps) else "")
        last.append(len(tokenizer.encode(text, add_special_tokens=False)) - 2)
    # Q_k is a running sum over predicted tokens, one to the left of the tokens themselves: hence the further token.
    cu_steps = [0, *(index + 2 - last[0] for index in last[1:])]
    if sorted(cu_steps) != cu_steps or last[0] < 1 or cu_steps[-1] > len(ids) - last[0]:
        raise ValueError(f"{item.place}: the card's step indices {last} are no offsets into {len(ids)} tokens")
    pieces = [tokenizer.decode([i]) for i in ids[last[0] :]]
    return ids[: last[0]], StepResponse(ids[last[0] :], cu_steps=cu_steps, pieces=pieces, steps=steps)


def card_micro(micro: Micro, pad_id: int | None) -> Micro:
    """The forward pass with pad tokens masked as keys, in the middle of the text as well."""
    if pad_id is None:
        return micro
    width = micro.input_ids.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=micro.input_ids.device).tril()
    seen = (micro.input_ids != pad_id)[:, None, None, :]
    return dataclasses.replace(micro, attention_mask=seen & causal)
