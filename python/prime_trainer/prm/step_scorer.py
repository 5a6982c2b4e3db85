"""Rewards of tokens, steps and responses under an implicit PRM.

The reward of a token is beta * (log pi_prm - log pi_ref). `cumulative`, Q_k, is the sum of rewards from the start of
the response to the end of step k (arXiv 2412.01981), or their mean for a PRM that was trained on the mean of every
prefix (arXiv 2604.13197); `single` is Q_k - Q_{k-1}, with Q_0 = 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

import prime_kernels as pk

from ..config.sections import Compat, PRMLossConfig, ScoreValue, Splitter
from ..data.groups import check_length
from ..models import forward, lm_head, prm_record, tokenizers, traits
from ..models.protocols import CausalLM, Tokenizer
from ..train.batch import Batch, Micro
from ..train.forward import predicting
from .eurus_card import CARD_BETA, card_micro, encode_card
from .items import Item, StepGroup, StepResponse, encode, items_of

RESPONSE_REWARDS = ("min", "mean", "sum", "last")


class NotFinite(ValueError):
    """A response on which a model overflows."""


@dataclass(frozen=True)
class StepRewards:
    """What one response got: S steps, T tokens (the end-of-sequence token included)."""

    steps: list[str]
    """[S], the response cut up: their concatenation is its text."""
    cu_steps: list[int]
    """[S + 1], the tokens at which steps start."""
    tokens: list[str]
    """[T]"""
    token_rewards: list[float]
    """[T]"""
    single: list[float]
    """[S]"""
    cumulative: list[float]
    """[S]"""
    value: ScoreValue = "sum"
    """What `cumulative` is of the rewards of the tokens so far."""

    def response(self, mode: str = "single") -> dict[str, float]:
        """`min`, `mean`, `sum` and `last` of the `single` or `cumulative` rewards of the steps."""
        values = {"single": self.single, "cumulative": self.cumulative}[mode]
        total = sum(values)
        return {"min": min(values), "mean": total / len(values), "sum": total, "last": values[-1]}


def score_steps(
    rows: Iterable[Mapping[str, Any]],
    *,
    prm: CausalLM,
    reference: CausalLM,
    tokenizer: Tokenizer,
    beta: float | None = None,
    value: ScoreValue | None = None,
    splitter: Splitter = "blank_line",
    compat: Compat | None = None,
    micro_batch_tokens: int = 4096,
    max_length: int | None = None,
) -> list[StepRewards]:
    """Scores the steps of responses, the PRM and the reference in one pass over rows that share prompts.

    Args:
        rows: dicts with `prompt` (text, or a chat) and `response` (text), `steps` (a list of texts, joined by blank
            lines) or `completions` (several responses); see prm/items.py.
        prm, reference: causal LMs (of `models.loading.load_model` or of transformers), on the same device.
        tokenizer: a fast tokenizer, the same for both.
        beta: None is that of the PRM's training (`prm.json` in the directory it was loaded from), and where that is not
            known 0.05, 10 for means; with `compat` the card's 0.001.
        value: what Q_k is of the rewards up to the end of step k, "sum" or "mean"; None is as the PRM was trained, the
            sum where that is not known.
        splitter: "blank_line", "line", "numbered" ("Step 2:"), "action" ("[VERIFY]") or "none"; `steps` win over it.
        compat: "eurus-card" computes what the EurusPRM-Stage2 card's snippet does: its template, its token indices
            (each step one token early, with the first tokens of the next) and its mask over pad tokens.
        micro_batch_tokens: padded tokens in one forward pass.
        max_length: of prompt and response in tokens; the models' positions where None.

    Returns:
        One StepRewards a response, in order.

    Raises:
        ValueError: a bad row (`rows[3]: ..`), an empty step, a response that does not fit, rewards that are not finite,
            means with `compat`.
    """
    items = [item for k, row in enumerate(rows) for item in items_of(row, f"rows[{k}]")]
    scorer = StepScorer(
        prm, reference, tokenizer, beta=beta, value=value, splitter=splitter, compat=compat,
        micro_batch_tokens=micro_batch_tokens, max_length=max_length,
    )  # fmt: skip
    found = scorer.score([scorer.encode(item) for item in items])
    scored = []
    for rewards in found:
        if isinstance(rewards, NotFinite):
            raise rewards
        scored.append(rewards)
    return scored


@dataclass(frozen=True)
class Encoded:
    """An item in tokens."""

    place: str
    prompt_ids: list[int]
    response: StepResponse


class StepScorer:
    """The two models and how to read responses with them; the arguments are those of `score_steps`."""

    def __init__(
        self,
        prm: CausalLM,
        reference: CausalLM,
        tokenizer: Tokenizer,
        *,
        beta: float | None,
        splitter: Splitter,
        compat: Compat | None,
        micro_batch_tokens: int,
        max_length: int | None,
        value: ScoreValue | None = None,
    ) -> None:
        if compat not in (None, "eurus-card"):
            raise ValueError(f"compat must be None or 'eurus-card', got {compat!r}")
        for name, model in (("prm", prm), ("reference", reference)):
            if compat is not None and traits.of(model).masks is None:
                raise ValueError(
                    f"compat = 'eurus-card' masks pad tokens inside a row, which {name} ({type(model).__name__} with "
                    f"{traits.of(model).attention} attention) cannot be given exactly; model.attention = 'sdpa' or "
                    "'eager' may"
                )
        self._prm, self._reference, self._tokenizer = prm, reference, tokenizer
        self._card, self._splitter = compat == "eurus-card", splitter
        self.value, self.beta = resolve(value, beta, compat, prm_record.read(getattr(prm, "name_or_path", "")))
        self._micro_batch_tokens = micro_batch_tokens
        self._limit = forward.length_limit([prm, reference], max_length)

    def encode(self, item: Item) -> Encoded:
        """Raises TooLong for a response that does not fit."""
        if self._card:
            prompt_ids, response = encode_card(self._tokenizer, item, self._splitter)
        else:
            prompt_ids = tokenizers.render(self._tokenizer, item.messages)
            response = encode(self._tokenizer, item, self._splitter)
        if self._limit is not None:
            check_length(item.place, prompt_ids, response, self._limit)
        return Encoded(item.place, prompt_ids, response)

    @torch.no_grad()
    def score(self, encoded: Sequence[Encoded]) -> list[StepRewards | NotFinite]:
        """The rewards of each response, or the error that says why it has none."""
        if not encoded:
            return []
        order, groups = self._group(encoded)
        batch = Batch.for_model(self._prm, groups, self._reference)
        if self._card:
            batch = Batch(groups, batch.device, layout="rows")
        log_ratio = torch.zeros(batch.num_tokens, device=batch.device)
        for micro in batch.micro_batches(range(len(groups)), self._micro_batch_tokens):
            if self._card:
                micro = card_micro(micro, self._tokenizer.pad_token_id)
            log_ratio[micro.tokens] = self._log_ratio(micro, batch.ids[micro.tokens])
        rewards = self.beta * log_ratio
        cu_steps, owned = _step_offsets(batch, [response for group in groups for response in group.responses])
        sums = {
            mode: pk.step_rewards(rewards, cu_steps, batch.cu_seqlens, mode=mode).tolist()
            for mode in ("single", "cumulative")
        }
        out: dict[int, StepRewards | NotFinite] = {}
        starts, token_rewards = batch.cu_seqlens.tolist(), rewards.tolist()
        for at, k in enumerate(order):
            own, response = token_rewards[starts[at] : starts[at + 1]], encoded[k].response
            if not all(map(math.isfinite, own)):
                # Alone, as the values of one that overflows reach all that share its pass: 0 * NaN is NaN.
                if len(encoded) > 1:
                    out[k] = self.score([encoded[k]])[0]
                else:
                    where = encoded[k].place
                    out[k] = NotFinite(f"{where}: the rewards are not finite: a model overflows on this response")
                continue
            single, cumulative = (sums[mode][owned[at]] for mode in ("single", "cumulative"))
            if self.value == "mean":
                cumulative = means(cumulative, response.cu_steps)
                single = [now - before for before, now in itertools.pairwise([0.0, *cumulative])]
            out[k] = StepRewards(
                response.steps, response.cu_steps, response.pieces, own, single, cumulative, self.value
            )
        return [out[k] for k in range(len(encoded))]

    def _group(self, encoded: Sequence[Encoded]) -> tuple[list[int], list[StepGroup]]:
        """Responses to the same prompt together: (index of each in `encoded`, groups). The card's pass has no masks
        for shared prompts: there every response is alone."""
        members: dict[Any, list[int]] = {}
        for k, each in enumerate(encoded):
            members.setdefault(k if self._card else tuple(each.prompt_ids), []).append(k)
        groups = [StepGroup(encoded[ks[0]].prompt_ids, [encoded[k].response for k in ks]) for ks in members.values()]
        return [k for ks in members.values() for k in ks], groups

    def _log_ratio(self, micro: Micro, ids: Tensor) -> Tensor:
        prm, reference = (lm_head.head(model, predicting(model, micro)) for model in (self._prm, self._reference))
        rounding = lm_head.logits_dtype(self._prm)
        return pk.linear_log_ratios(prm, reference, ids, logits_dtype=rounding).log_ratio


def resolve(
    value: ScoreValue | None, beta: float | None, compat: Compat | None, trained: prm_record.Trained | None
) -> tuple[ScoreValue, float]:
    """What steps are scored by, and beta. What is not given is as the PRM was trained, or else as the loss is by
    default that such values are of. Raises ValueError for means with the card's arithmetic, which has sums alone."""
    known = None if trained is None else trained.value
    if compat is not None:
        if (value or known) == "mean":
            whose = "score.value" if value is not None else f"a PRM of kind 'prefix' ({prm_record.RECORD})"
            raise ValueError(f"compat = {compat!r} scores by sums, {whose} by means: score.value = 'sum' asks for sums")
        return "sum", CARD_BETA if beta is None else beta
    chosen = value or known or "sum"
    if beta is None:
        alike = PRMLossConfig(kind="prefix" if chosen == "mean" else "ce")
        beta = trained.beta if trained is not None and chosen == known else alike.scale
    return chosen, beta


def value_of(rewards: Any, place: str) -> ScoreValue:
    """`rewards.value` of a row of scores; before there was one, all were sums. Raises ValueError for another."""
    given = rewards.get("value", "sum") if isinstance(rewards, dict) else "sum"
    value: ScoreValue | None = next((each for each in get_args(ScoreValue) if each == given), None)
    if value is None:
        raise ValueError(f"{place}: rewards.value must be 'sum' or 'mean', got {given!r}")
    return value


def means(sums: Sequence[float], cu_steps: Sequence[int]) -> list[float]:
    """[S] the mean reward of the tokens up to the end of each step, from sums [S] and offsets [S + 1]; 0 for none."""
    return [total / max(1, end - cu_steps[0]) for total, end in zip(sums, cu_steps[1:], strict=True)]


def _step_offsets(batch: Batch, responses: Sequence[StepResponse]) -> tuple[Tensor, list[slice]]:
    """([S + 1] offsets of all steps in the batch's tokens, the steps of each response). Tokens after a response's last
    step, which only the card leaves, form an extra step that no response owns."""
    offsets, owned = [0], []
    for start, end, response in zip(
        batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), responses, strict=True
    ):
        first = len(offsets) - 1
        offsets += [start + at for at in response.cu_steps[1:]]
        owned.append(slice(first, len(offsets) - 1))
        if offsets[-1] != end:
            offsets.append(end)
    return torch.tensor(offsets, device=batch.device), owned
