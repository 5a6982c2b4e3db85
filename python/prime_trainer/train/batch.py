"""Groups of responses, packed once: flat response tokens with cu_seqlens, and how a forward pass lays them out.

A pass is one row of prompts, each followed by its responses, each of which sees the prompt and itself and nothing else:
a prompt is computed once for as many responses as fit into the pass, and nothing is padded but, on CPUs, the end of the
row (`models.forward.filled`). Models whose layers cannot keep the responses of a row apart (`models.traits`) get one
response a row, padded, where nothing needs a mask. For flash-attn's varlen kernels a row has sequences instead, each a
prompt with a response; positions that restart at 0 mark where a sequence begins.

Passes are laid out from the lists of the groups, on the host; nothing here reads what is on the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..data.groups import Group
from ..models import traits
from ..models.attention.segments import Segments
from ..models.forward import filled
from ..models.protocols import CausalLM
from ..scale.ranks import SINGLE, Ranks, deal
from ..scale.transfer import upload, upload_together

Entry = tuple[int, list[int]]
"""A group and those of its responses that share a row with its prompt."""
Row = list[Entry]
Parts = Sequence[Sequence[int]]
"""Minibatches, each as indices of groups."""


@dataclass(frozen=True)
class Micro:
    """One forward pass. T is its number of response tokens, B of responses, both in packed order."""

    input_ids: Tensor
    """[rows, L]"""
    position_ids: Tensor | None
    """[rows, L], or None where rows are single sequences and the model's own are right."""
    attention_mask: Segments | Tensor | None
    """What the one row consists of; or bool [rows, 1, L, L]; or None where causal attention is right."""
    predictors: Tensor
    """[T] index into rows * L of the hidden state that predicts each response token."""
    tokens: Tensor
    """[T] index of each token in the batch's packed tensors."""
    responses: Tensor
    """[B] index of each response in the batch."""
    cu_seqlens: Tensor
    """[B + 1] of this micro-batch's own tokens."""


class Batch:
    """All groups of a step: `ids` [T], `cu_seqlens` [B + 1], `cu_groups` [G + 1] (in responses), `outcomes` [B].

    `answered` [N] are the responses of at least one token, `last_tokens` [N] the indices of their last ones.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        device: torch.device | str = "cpu",
        ranks: Ranks = SINGLE,
        layout: traits.Layout = "shared",
        reach: int | None = None,
    ) -> None:
        """`reach`: longer sequences have a pass of their own each (`models.traits`)."""
        if not groups:
            raise ValueError("groups is empty; a batch needs at least one")
        self.groups, self.device, self.ranks = list(groups), torch.device(device), ranks
        self.layout, self.reach = layout, reach
        responses = [r for g in self.groups for r in g.responses]
        lengths = [len(r.ids) for r in responses]
        self._ids = torch.tensor([i for r in responses for i in r.ids], dtype=torch.int64)
        offsets, groups_at = _cumulative(lengths), _cumulative([len(g.responses) for g in self.groups])
        self._starts: list[int] = offsets.tolist()
        self._first: list[int] = groups_at.tolist()
        answered = torch.tensor([k for k, length in enumerate(lengths) if length], dtype=torch.int64)
        self._last = offsets[1:][answered] - 1
        self.ids, self.cu_seqlens, self.cu_groups, self.answered, self.last_tokens = upload_together(
            [self._ids, offsets, groups_at, answered, self._last], self.device
        )
        self.outcomes = upload(torch.tensor([r.outcome for r in responses]), self.device)
        self._laid_out: dict[tuple[tuple[int, ...], int], list[Micro]] = {}

    @classmethod
    def for_model(cls, model: CausalLM, groups: Sequence[Group], *others: CausalLM) -> Batch:
        """On the model's device, laid out as it reads exactly, and as `others` do."""
        models = [model, *others]
        return cls(groups, model.device, layout=traits.layout_of(models), reach=traits.reach_of(models))

    @property
    def rollout_logp(self) -> Tensor:
        """[T] the sampler's log-probs."""
        given = [p for g in self.groups for r in g.responses for p in r.logprobs or ()]
        return upload(torch.tensor(given), self.device)

    @property
    def num_tokens(self) -> int:
        return self._starts[-1]

    @property
    def num_responses(self) -> int:
        return len(self._starts) - 1

    def minibatches(self, count: int, generator: torch.Generator | None = None) -> list[list[int]]:
        """Group indices in `count` parts of nearly equal size (fewer if there are fewer groups), shuffled if asked."""
        n = len(self.groups)
        order = list(range(n)) if generator is None else torch.randperm(n, generator=generator).tolist()
        count = min(count, n)
        return [order[n * k // count : n * (k + 1) // count] for k in range(count)]

    def tokens_of(self, groups: Sequence[int]) -> int:
        return sum(self._starts[self._first[g + 1]] - self._starts[self._first[g]] for g in groups)

    def responses_of(self, groups: Sequence[int]) -> int:
        return sum(len(self.groups[g].responses) for g in groups)

    def spans_of(self, groups: Sequence[int]) -> tuple[slice, slice]:
        """(responses, tokens) of consecutive groups."""
        responses = slice(self._first[groups[0]], self._first[groups[-1] + 1])
        return responses, slice(self._starts[responses.start], self._starts[responses.stop])

    def response_spans(self, group: int) -> list[slice]:
        """Tokens of each response of a group."""
        return [slice(self._starts[m], self._starts[m + 1]) for m in self._members(group)]

    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(after - before for before, after in itertools.pairwise(self._starts))

    def ends(self, step_ends: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the sections that end with each response and, with `step_ends` (bool [V], on the host), after each token
        that ends a step: (their last tokens [S], their offsets [S + 1]), on the device."""
        mask = torch.zeros(self.num_tokens, dtype=torch.bool)
        mask[self._last] = True
        if step_ends is not None:
            mask |= step_ends[self._ids]
        ends = mask.nonzero().squeeze(1)
        last, offsets = upload_together([ends, torch.cat([ends.new_zeros(1), ends + 1])], self.device)
        return last, offsets

    def lay_out(self, parts: Parts, max_tokens: int) -> None:
        """Prepares `micro_batches` of each of `parts` and copies them to the device together."""
        keys = {(tuple(part), max_tokens) for part in parts}
        new = {key: self._planned(*key) for key in sorted(keys - self._laid_out.keys())}
        there = iter(_uploaded([micro for micros in new.values() for micro in micros], self.device))
        for key, micros in new.items():
            self._laid_out[key] = [next(there) for _ in micros]

    def micro_batches(self, groups: Sequence[int], max_tokens: int) -> list[Micro]:
        """Forward passes of at most `max_tokens` tokens, padding included (a longer sequence goes alone).

        With several ranks, the passes of this rank's share of `groups`, dealt out so that tokens balance. Every rank
        gets the same number of passes, some of them without responses: the passes of a sharded model are collective.
        What `lay_out` has prepared is at hand.
        """
        self.lay_out([groups], max_tokens)
        return self._laid_out[tuple(groups), max_tokens]

    def _planned(self, groups: Sequence[int], max_tokens: int) -> list[Micro]:
        loads = [self._length((g, self._members(g))) for g in groups]
        plans = [self._passes([groups[i] for i in part], max_tokens) for part in deal(loads, self.ranks.size)]
        mine = plans[self.ranks.rank]
        nothing: list[Row] = [[(groups[0], [])]]
        rows_of = [*mine, *[nothing] * (max(map(len, plans)) - len(mine))]
        return [self._micro(rows, max_tokens) for rows in rows_of]

    def _passes(self, groups: Sequence[int], max_tokens: int) -> list[list[Row]]:
        entries, alone = [], []
        for g in groups:
            members = self._members(g)
            if self.layout != "shared":
                entries += [(g, [m]) for m in members]
            elif self.reach is not None and max(self._length((g, [m])) for m in members) > self.reach:
                alone += [(g, [m]) for m in members]
            else:
                entries += self._shares(g, members, max_tokens)
        for each in (entries, alone):
            each.sort(key=lambda entry: (self._length(entry), entry[1][0]))
        if self.layout != "rows":
            return [[row] for row in [*self._packed(entries, max_tokens), *([entry] for entry in alone)]]
        passes: list[list[Row]] = []
        for entry in entries:
            if passes and self._length(entry) * (len(passes[-1]) + 1) <= max_tokens:  # the longest so far
                passes[-1].append([entry])
            else:
                passes.append([[entry]])
        return passes

    def _shares(self, group: int, members: Sequence[int], max_tokens: int) -> list[Entry]:
        """The group in as few rows of at most `max_tokens` as its responses fit into in their order."""
        found: list[Entry] = []
        for m in members:
            if found and self._length((group, [*found[-1][1], m])) <= max_tokens:
                found[-1][1].append(m)
            else:
                found.append((group, [m]))
        return found

    def _packed(self, entries: Sequence[Entry], limit: int) -> list[Row]:
        """First fit, longest first: few rows, all but the last nearly full."""
        rows: list[Row] = []
        room: list[int] = []
        for entry in reversed(entries):
            length = self._length(entry)
            row = next((k for k, free in enumerate(room) if free >= length), None)
            if row is None:
                row = len(rows)
                rows.append([])
                room.append(limit)
            rows[row].append(entry)
            room[row] -= length
        return rows

    def _length(self, entry: Entry) -> int:
        group, members = entry
        return len(self.groups[group].prompt_ids) + sum(self._starts[m + 1] - self._starts[m] for m in members)

    def _members(self, group: int) -> list[int]:
        return list(range(self._first[group], self._first[group + 1]))

    def _micro(self, rows: list[Row], max_tokens: int) -> Micro:
        """On the host."""
        width = max(sum(map(self._length, entries)) for entries in rows)
        mask = self._segments(rows[0], max_tokens) if self.layout == "shared" else None
        if mask is not None:
            width = mask.length
        shape = (len(rows), width)
        input_ids = torch.zeros(shape, dtype=torch.int64)
        position_ids = torch.zeros(shape, dtype=torch.int64)
        none = torch.zeros(0, dtype=torch.int64)
        predicted_at, tokens = [none], [none]
        responses: list[int] = []
        lengths: list[int] = []
        for row, entries in enumerate(rows):
            at = 0
            # Padding is an ordinary token: of a pad token, whose embedding some models keep at 0, the gradient of a
            # norm is NaN, which reaches the parameters even from where nothing is learnt.
            input_ids[row] = self.groups[entries[0][0]].prompt_ids[0]
            for g, members in entries:
                prompt = self.groups[g].prompt_ids
                span, at = slice(at, at + len(prompt)), at + len(prompt)
                last = at - 1
                input_ids[row, span] = torch.tensor(prompt)
                position_ids[row, span] = torch.arange(len(prompt))
                for m in members:
                    length = self._starts[m + 1] - self._starts[m]
                    span = slice(at, at + length)
                    input_ids[row, span] = self._ids[self._starts[m] : self._starts[m + 1]]
                    position_ids[row, span] = torch.arange(len(prompt), len(prompt) + length)
                    where = torch.arange(at - 1, at + length - 1)
                    where[:1] = last  # the first token is predicted by the prompt's last
                    predicted_at.append(row * width + where)
                    tokens.append(torch.arange(self._starts[m], self._starts[m + 1]))
                    responses.append(m)
                    lengths.append(length)
                    at += length
        return Micro(
            input_ids,
            None if mask is None and self.layout != "varlen" else position_ids,
            mask,
            torch.cat(predicted_at),
            torch.cat(tokens),
            torch.tensor(responses, dtype=torch.int64),
            _cumulative(lengths),
        )

    def _segments(self, row: Row, max_tokens: int) -> Segments | None:
        """With what fills the row up; None of a single sequence, which no mask keeps apart from anything."""
        if len(row) == 1 and len(row[0][1]) <= 1:
            return None
        found = []
        for g, members in row:
            prompt, lengths = len(self.groups[g].prompt_ids), [self._starts[m + 1] - self._starts[m] for m in members]
            found.append((prompt, tuple(lengths)) if len(lengths) > 1 else (prompt + sum(lengths), ()))
        length = sum(map(self._length, row))
        padding = min(filled(length, self.device.type), max(length, max_tokens)) - length
        return Segments((*found, (padding, ())) if padding else tuple(found))


def _uploaded(micros: Sequence[Micro], device: torch.device) -> list[Micro]:
    """All in one copy."""
    columns = [{field.name: getattr(micro, field.name) for field in fields(micro)} for micro in micros]
    host = [{name: each for name, each in one.items() if isinstance(each, Tensor)} for one in columns]
    there = iter(upload_together([each for one in host for each in one.values()], device) if host else ())
    return [replace(micro, **{name: next(there) for name in one}) for micro, one in zip(micros, host, strict=True)]


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
