"""How the trainer reads a causal LM: its head, the masks it takes, and which rows give the log-probs of single passes.

Nothing of this is taken from a model's name. What may hold is read from the configuration; what does hold is proved by
a few short passes when the model is loaded, against each sequence by itself.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from prime_kernels.integrations import CausalHead, causal_head

from .attention import interface as attention_interface
from .attention.segments import Segments
from .protocols import CausalLM

Layout = Literal["shared", "rows", "varlen"]
"""`shared`: a row of prompts, each with its responses; `rows`: one response a row; `varlen`: a row of sequences."""

PROBED = {"cpu": 1024}
"""Distances in tokens that loading a model probes at most, by device: a pass of so many takes a CPU long."""
PROBED_ELSEWHERE = 4096

# Of the probe: groups of a prompt and responses, in tokens.
PROBE = ((7, (6, 3, 5)), (3, (4, 6)))
# Where the configuration has no distance beyond which attention changes: as few as show a response that sees its
# sibling, and a group that sees the one before it. Loading takes as long as these passes.
SHORT_PROBE = ((4, (3, 2)), (2, (3,)))
# Largest relative error (root mean square over the hidden states that predict) that is rounding, by dtype; where a
# state or a window leaks it is above 0.1.
ROUNDING = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}
# Configuration names of distances in tokens beyond which attention changes.
REACH = re.compile(r"window|chunk|local|block_size|sliding|index_topk|compress")

_log = logging.getLogger(__name__)


class UnsupportedModel(ValueError):
    """The trainer cannot read this model exactly; the message says what differs."""


@dataclass(frozen=True)
class Masks:
    """The form in which a model takes masks of shared rows."""

    windows: Mapping[str, int | None]
    """By layer type how many tokens a token sees, itself included; None is all. The type "" stands for all layers."""
    kernel: attention_interface.Kernel | None = None
    """What attends to rows without a mask of all pairs, None where the model takes only such masks."""

    def row(self, segments: Segments, device: torch.device) -> Any:
        """A row as the model takes it: one mask or one a layer type."""
        assert self.kernel is not None
        made = {
            kind: attention_interface.mask(segments, window, self.kernel, device)
            for kind, window in self.windows.items()
        }
        return made.get("", made)

    def of(self, seen: Tensor, position_ids: Tensor | None, additive: torch.dtype | None) -> Any:
        """`seen` bool [b, 1, L, L] as the model takes it: one mask or one a layer type, bool or added in a dtype."""
        made = {kind: self._one(seen, position_ids, window, additive) for kind, window in self.windows.items()}
        return made.get("", made)

    @staticmethod
    def _one(seen: Tensor, position_ids: Tensor | None, window: int | None, additive: torch.dtype | None) -> Tensor:
        if window is not None:
            at = torch.arange(seen.shape[-1], device=seen.device)[None] if position_ids is None else position_ids
            seen = seen & (at[:, None, :, None] - at[:, None, None, :] < window)
        if additive is None:
            return seen
        return torch.zeros(seen.shape, dtype=additive, device=seen.device).masked_fill_(
            ~seen, torch.finfo(additive).min
        )


@dataclass(frozen=True)
class Traits:
    """What was proved of a model with its attention implementation."""

    attention: str
    head: CausalHead
    layout: Layout
    masks: Masks | None
    """None where no form of masks is exact; without a kernel where only masks of all pairs of tokens are."""
    reason: str = ""
    """Why responses do not share rows, where they do not."""
    reach: int | None = None
    """The longest sequence that shared rows are proved for; None is any."""


def of(model: CausalLM) -> Traits:
    """How to read `model`: proved at the first call and kept with it. Raises UnsupportedModel."""
    known: Traits | None = getattr(model, "traits", None)
    attention = model.config._attn_implementation
    if known is None or known.attention != attention:
        known = _prove(model, attention)
        model.traits = known  # type: ignore[attr-defined]
        if known.layout == "rows":
            _say(f"{type(model).__name__}: one response a row, {known.reason}")
    return known


def layout_of(models: Sequence[CausalLM]) -> Layout:
    """A layout that all `models` read."""
    found = {of(model).layout for model in models}
    return next(iter(found)) if len(found) == 1 else "rows"


def reach_of(models: Sequence[CausalLM]) -> int | None:
    """The longest sequence that shared rows are proved for with all `models`; None is any."""
    return min((reach for reach in (of(model).reach for model in models) if reach is not None), default=None)


def expected_layout(model: CausalLM, attention: str) -> Layout:
    """The layout that a model's kinds of layers suggest, for one without data; loading it proves the layout."""
    config = _text_config(model.config)
    kinds = set(getattr(config, "layer_types", None) or ())
    if getattr(model, "_is_stateful", False) or kinds - {"full_attention", "sliding_attention", "chunked_attention"}:
        return "rows"
    return "varlen" if attention.startswith("flash_attention") else "shared"


@functools.cache
def _say(line: str) -> None:
    """Once, however many copies of a model are loaded."""
    _log.warning(line)


def hidden_states(
    model: CausalLM,
    input_ids: Tensor,
    position_ids: Tensor | None,
    seen: Segments | Tensor | None,
    masks: Masks | None,
) -> Tensor:
    """Last hidden states [b, L, H]; without positions the model's own.

    `seen` is None (causal), one row of prompts and responses, or bool [b, 1, L, L], true where a token sees.
    """
    inputs: dict[str, Any] = {"input_ids": input_ids, "use_cache": False}
    if position_ids is not None:
        inputs["position_ids"] = position_ids
    if seen is None:
        return _last(model, inputs)
    if masks is None:
        raise UnsupportedModel(f"{type(model).__name__} reads no masks: one response a row, without padding inside")
    if isinstance(seen, Segments):
        if masks.kernel is not None:
            with attention_interface.implementation(model, attention_interface.NAME):
                return _last(model, inputs | {"attention_mask": masks.row(seen, input_ids.device)})
        seen = seen.seen(input_ids.device)
    # A bool mask is for SDPA; eager attention adds what it is given.
    additive = None if model.config._attn_implementation == "sdpa" else dtype_of(model)
    return _last(model, inputs | {"attention_mask": masks.of(seen, position_ids, additive)})


def _last(model: CausalLM, inputs: dict[str, Any]) -> Tensor:
    found: Tensor = model.base_model(**inputs).last_hidden_state
    return found


def dtype_of(model: CausalLM) -> torch.dtype:
    """The dtype that the model computes in; of one in shards, not that of its masters."""
    return getattr(model, "compute_dtype", None) or next(iter(model.parameters())).dtype


def _prove(model: CausalLM, attention: str) -> Traits:
    name = type(model).__name__
    try:
        head = causal_head(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # whatever a model does with inputs that it was not made for
        known = isinstance(problem, (TypeError, ValueError)) and str(problem).startswith("model: ")
        what = str(problem) if known else f"{name}'s forward pass ends in {first_line(problem)}"
        raise UnsupportedModel(what.removeprefix("model: ")) from None
    with torch.no_grad():
        probe = _Probe(model, PROBE if _distances(model.config) else SHORT_PROBE)
        reason, readable = "a stream of sequences leaks", None
        if attention.startswith("flash_attention"):
            if _exact(probe, probe.stream) is None:
                return Traits(attention, head, "varlen", None)
        else:
            for masks in _mask_forms(model.config):
                failed = _exact(probe, lambda: probe.shared(masks)) or _far_exact(model, masks)  # noqa: B023
                if failed is None:
                    for kernel in attention_interface.kernels(model.device):
                        own = replace(masks, kernel=kernel)
                        failed = _exact(probe, lambda: probe.shared(own)) or _far_exact(model, own)  # noqa: B023
                        if failed is None:
                            return Traits(attention, head, "shared", own, reach=_reach(model))
                    readable = masks
                reason = f"as rows that share a prompt {failed}"
                if readable is not None:
                    break
        failed = _exact(probe, probe.rows)
    if failed is not None:
        raise UnsupportedModel(f"{name} cannot be read exactly: of padded rows, one response each, {failed}")
    return Traits(attention, head, "rows", readable, reason)


def _exact(probe: _Probe, passes: Callable[[], Tensor]) -> str | None:
    """None where the hidden states are those of each sequence by itself, else what is wrong."""
    try:
        found = passes()
    except torch.OutOfMemoryError:
        raise
    except attention_interface.UnsupportedLayer as problem:
        return f"are refused: {problem}"
    except Exception as problem:
        return f"end in {first_line(problem)}"
    error = probe.error(found)
    return None if error <= probe.rounding else f"differ from single passes by {error:.2g}"


def first_line(problem: Exception) -> str:
    """An exception in one line of bounded length."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"


def _far_exact(model: CausalLM, masks: Masks) -> str | None:
    """The same of a row in which responses stand beyond every window that rows can exceed."""
    config = _text_config(model.config)
    distances = [value for value in _distances(config) if sum(PROBE[0][1]) < value < _probed(model)]
    longest = positions(model)
    own = 6
    prompt = max(distances, default=0) + 4
    if longest is not None:
        prompt = min(prompt, longest - own)
    if not distances or prompt + own <= max(distances):
        return None
    probe = _Probe(model, ((prompt, (2, own)),), first=1)
    return _exact(probe, lambda: probe.shared(masks))


def _probed(model: CausalLM) -> int:
    """Distances from here on are not probed."""
    return 1 + PROBED.get(model.device.type, PROBED_ELSEWHERE)


def _reach(model: CausalLM) -> int | None:
    """A sequence of as many tokens as a distance does not exceed it."""
    longest = positions(model)
    distances = [value for value in _distances(model.config) if value >= _probed(model)]
    return min((value for value in distances if longest is None or value < longest), default=None)


def positions(model: CausalLM) -> int | None:
    """The longest sequence the model can read, None where it does not say."""
    longest = getattr(_text_config(model.config), "max_position_embeddings", None)
    return longest if isinstance(longest, int) else None


def _text_config(config: Any) -> Any:
    """The language model's part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _distances(config: Any) -> list[int]:
    """Numbers of a configuration that may be distances beyond which attention changes."""
    named = vars(_text_config(config)).items()
    return [value for name, value in named if REACH.search(name) and type(value) is int and value > 0]


def _mask_forms(config: Any) -> Iterator[Masks]:
    """The likeliest first. One mask where the layer types are alike, else one a type."""
    config = _text_config(config)
    window = getattr(config, "sliding_window", None)
    window = window if isinstance(window, int) and window > 0 else None
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds or "chunked_attention" in kinds:
        yield Masks({kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)})
    yield Masks({"": None})
    if window is not None:
        yield Masks({"": window})


class _Probe:
    """Random groups in the layouts of `train.batch`, and what each sequence gives by itself."""

    def __init__(self, model: CausalLM, shape: Sequence[tuple[int, Sequence[int]]], first: int = 0) -> None:
        """`shape` has the tokens of prompts and their responses; responses before `first` are not compared."""
        self._model, self._device = model, model.device
        vocabulary = model.get_input_embeddings().weight.shape[0]
        generator = torch.Generator().manual_seed(0)

        def ids(length: int) -> list[int]:
            # Few ids, such as those of padding, mean something to some models.
            return torch.randint(min(3, vocabulary - 1), vocabulary, (length,), generator=generator).tolist()

        self._groups = [(ids(prompt), [ids(length) for length in responses]) for prompt, responses in shape]
        self._first = first
        alone = [self._run([prompt + response])[0] for prompt, response in self._sequences()]
        self._alone = torch.cat([self._predicting(h, p, r) for h, (p, r) in zip(alone, self._sequences(), strict=True)])
        prompt, response = self._sequences()[0]
        again = self._run([[*prompt, *response]] * 2)[1]
        noise = _relative(again, alone[0])
        self.rounding = max(ROUNDING[self._alone.dtype], 4 * noise)
        if noise > 0.1:
            raise UnsupportedModel(
                f"{type(model).__name__} does not give the same twice (by {noise:.2g}): is it in training mode?"
            )

    def error(self, found: Tensor) -> float:
        return _relative(found, self._alone)

    def rows(self) -> Tensor:
        """One response a row, padded on the right."""
        sequences = self._sequences()
        width = max(len(p) + len(r) for p, r in sequences)
        hidden = self._run([p + r + p[:1] * (width - len(p) - len(r)) for p, r in sequences])
        return torch.cat([self._predicting(h, p, r) for h, (p, r) in zip(hidden, sequences, strict=True)])

    def stream(self) -> Tensor:
        """All sequences end to end, told apart by positions that start anew."""
        sequences = self._sequences()
        positions = [k for p, r in sequences for k in range(len(p) + len(r))]
        hidden = self._run([[i for p, r in sequences for i in p + r]], positions)[0]
        pieces = hidden.split([len(p) + len(r) for p, r in sequences])
        return torch.cat([self._predicting(h, p, r) for h, (p, r) in zip(pieces, sequences, strict=True)])

    def shared(self, masks: Masks) -> Tensor:
        """All groups in one row, a prompt before its responses."""
        ids: list[int] = []
        predictors: list[int] = []
        for prompt, responses in self._groups:
            ids += prompt
            last = len(ids) - 1
            for k, response in enumerate(responses):
                if k >= self._first:
                    predictors += [last, *range(len(ids), len(ids) + len(response) - 1)]
                ids += response
        row = Segments(tuple((len(prompt), tuple(map(len, responses))) for prompt, responses in self._groups))
        return self._run([ids], row.positions.tolist(), row, masks)[0][predictors]

    def _sequences(self) -> list[tuple[list[int], list[int]]]:
        return [(prompt, response) for prompt, responses in self._groups for response in responses[self._first :]]

    def _tensor(self, rows: list[list[int]]) -> Tensor:
        return torch.tensor(rows, device=self._device)

    def _run(
        self,
        rows: list[list[int]],
        positions: list[int] | None = None,
        seen: Segments | None = None,
        masks: Masks | None = None,
    ) -> Tensor:
        at = None if positions is None else self._tensor([positions])
        return hidden_states(self._model, self._tensor(rows), at, seen, masks)

    @staticmethod
    def _predicting(hidden: Tensor, prompt: list[int], response: list[int]) -> Tensor:
        return hidden[len(prompt) - 1 : len(prompt) + len(response) - 1]


def _relative(found: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference, relative; infinite where something is not finite."""
    error = ((found - wanted).double().norm() / wanted.double().norm().clamp_min(1e-30)).item()
    return error if error == error else float("inf")
