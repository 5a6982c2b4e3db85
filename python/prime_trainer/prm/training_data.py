"""What `prime-trainer prm` learns from: labelled responses and labelled steps, in tokens and checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from ..config.sections import TrainPRMConfig
from ..data.groups import fits
from ..models import tokenizers
from ..models.protocols import Tokenizer
from ..run.seeds import shuffled
from .items import Item, StepGroup, encode, grouped, read_items


def outcome_groups(
    path: Path, cfg: TrainPRMConfig, tokenizer: Tokenizer, limit: int, seed: int
) -> tuple[list[StepGroup], list[StepGroup]]:
    """(train, held out), split by prompt. Raises ValueError, naming the file, for data that no PRM can learn from."""
    groups = _read_groups(path, "train_prm.path", cfg, tokenizer, limit, steps=False)
    if cfg.eval_path is not None:
        held_out = _read_groups(cfg.eval_path, "train_prm.eval_path", cfg, tokenizer, limit, steps=False)
    else:
        count = min(len(groups) - 1, math.ceil(cfg.eval_share * len(groups)))
        order = shuffled(len(groups), seed, "prm", "split")
        held_out = [groups[k] for k in sorted(order[:count])]
        groups = [groups[k] for k in sorted(order[count:])]
    _check_classes(groups, f"train_prm.path: {path}")
    if cfg.eval_path is not None:
        _check_classes(held_out, f"train_prm.eval_path: {cfg.eval_path}")
    if cfg.kind in ("dpo", "nca") and not any(len({r.outcome > 0.5 for r in g.responses}) > 1 for g in groups):
        raise ValueError(
            f"train_prm.kind = {cfg.kind!r} needs prompts with a right and a wrong response; {path} has none"
        )
    return groups, held_out


def _check_classes(groups: Sequence[StepGroup], where: str) -> None:
    labels = {r.outcome > 0.5 for g in groups for r in g.responses}
    if len(labels) == 1:
        raise ValueError(
            f"{where}: every label is {'above' if labels.pop() else 'at most'} 0.5: an implicit PRM needs right and "
            "wrong responses"
        )


def step_groups(path: Path, cfg: TrainPRMConfig, tokenizer: Tokenizer, limit: int) -> list[StepGroup]:
    """Step-labelled responses (`StepResponse`), a group each."""
    groups = _read_groups(path, "train_prm.step_path", cfg, tokenizer, limit, steps=True)
    labels = {y for g in groups for r in g.responses for y in r.step_labels if y is not None}
    if len(labels) < 2:
        raise ValueError(f"train_prm.step_path: the step labels of {path} are all {labels or 'null'}")
    # One response a group, so that batches have the size asked for.
    return [StepGroup(g.prompt_ids, [r]) for g in groups for r in g.responses]


def _read_groups(
    path: Path, key: str, cfg: TrainPRMConfig, tokenizer: Tokenizer, limit: int, *, steps: bool
) -> list[StepGroup]:
    pairs, left_out = [], 0
    for item in read_items(path, key):
        _check_labels(item, steps)
        prompt_ids, response = tokenizers.render(tokenizer, item.messages), encode(tokenizer, item, "none")
        if not fits(item.place, prompt_ids, response, limit, "train_prm", cfg.too_long):
            left_out += 1
            continue
        # Texts of tokens and steps are for people to read; a training set of them would fill the memory.
        pairs.append((prompt_ids, dataclasses.replace(response, pieces=[], steps=[])))
    if not pairs:
        raise ValueError(f"{key}: all {left_out} responses of {path} are longer than {limit} tokens")
    if left_out:
        print(f"{key}: {left_out} of {left_out + len(pairs)} responses are longer than {limit} tokens and left out")
    return grouped(pairs)


def _check_labels(item: Item, steps: bool) -> None:
    if not steps and item.label is None:
        raise ValueError(f"{item.place}: label is missing: the outcome of the response, from 0 to 1")
    if steps and (item.step_labels is None or all(label is None for label in item.step_labels)):
        raise ValueError(f"{item.place}: steps and step_labels are needed, with at least one label")
