"""Supervised warm-up on chat data: mean negative log-likelihood of the answers' tokens, prompts masked."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import prime_kernels as pk

from .config.run_config import RunConfig
from .data import chat, demonstrations
from .data.groups import Group, Response, fits
from .data.readers import read_rows
from .data.tasks import load_task
from .models import forward, lm_head, loading, tokenizers
from .models.placement import load_trained
from .models.protocols import Tokenizer
from .run import checkpoint, hub
from .run.output_lock import owns_output
from .run.seeds import shuffled
from .scale.transfer import Values
from .train.batch import Batch
from .train.forward import predicting
from .train.nonfinite_guard import Skips
from .train.supervised_loop import fit
from .train.trainable import Trainable


@owns_output
def run(cfg: RunConfig) -> Path:
    """Trains `cfg.model` on the demonstrations or on `sft.path`; returns the directory of the saved model.

    Ctrl-C stops after the current step and leaves a checkpoint for `--resume` beside the model as it is then.
    """
    if cfg.resume:
        hub.resume(cfg.output)
    models = loading.fingerprints({"model.path": cfg.model})
    state = checkpoint.begin(cfg, models)
    tokenizer = tokenizers.load_tokenizer(cfg.model)
    model = load_trained(cfg.model, cfg.seed)
    examples = _examples(cfg, tokenizer, forward.length_limit([model], cfg.sft.max_length))
    trainable = Trainable(model, lr=cfg.sft.lr, betas=(0.9, 0.95), grad_clip=cfg.sft.grad_clip)
    size = min(cfg.sft.batch_size, len(examples))
    per_epoch = math.ceil(len(examples) / size)
    total = cfg.sft.epochs * per_epoch
    skips = Skips(min(cfg.sft.max_skipped, total), "sft.max_skipped", "sft.lr")

    def backward(step: int) -> Values:
        epoch, at = divmod(step, per_epoch)
        order = shuffled(len(examples), cfg.seed, "sft", epoch)
        batch = Batch.for_model(model, [examples[i] for i in order[at * size : (at + 1) * size]])
        loss: float | torch.Tensor = 0.0
        for micro in batch.micro_batches(range(len(batch.groups)), cfg.micro_batch_tokens):
            head = lm_head.head(model, predicting(model, micro))
            part = pk.linear_nll(
                head.hidden, head.weight, batch.ids[micro.tokens], bias=head.bias, denominator=batch.num_tokens,
                **lm_head.options(model),
            )  # fmt: skip
            part.backward()
            loss = loss + part.detach().double()
        return {"loss": loss, "tokens": batch.num_tokens}

    final = cfg.output / "final"
    fit(
        cfg, cfg.checkpoint, cfg.metrics, "sft", state, trainable, total, backward, warmup=cfg.sft.warmup, skips=skips,
        finish=lambda: loading.save(model, tokenizer, final), models=models,
    )  # fmt: skip
    return final


def _examples(cfg: RunConfig, tokenizer: Tokenizer, limit: int) -> list[Group]:
    """A group each, of at most `limit` tokens."""
    if cfg.sft.path is not None:
        rows = list(_chat_rows(cfg.sft.path, cfg.sft.system_prompt))
    else:
        made = demonstrations.make(
            load_task(cfg.task, cfg.seed), cfg.sft.demonstrations, cfg.sft.worked_fraction, cfg.seed
        )
        rows = [(f"demonstration {k}", problem.messages, answer) for k, (problem, answer) in enumerate(made, 1)]
    eos = tokenizer.eos_token_id
    groups = []
    for place, messages, answer in rows:
        prompt = tokenizers.render(tokenizer, messages)
        response = Response([*tokenizer.encode(answer, add_special_tokens=False), eos])
        if fits(place, prompt, response, limit, "sft", cfg.sft.too_long):
            groups.append(Group(prompt, [response]))
    where = cfg.sft.path or "the task"
    if not groups:
        raise ValueError(f"sft.max_length: all {len(rows)} examples from {where} are longer than {limit} tokens")
    if len(groups) < len(rows):
        left_out = len(rows) - len(groups)
        print(f"sft: {left_out} of {len(rows)} examples from {where} are longer than {limit} tokens and left out")
    return groups


def _chat_rows(path: Path, system_prompt: str | None = None) -> Iterator[tuple[str, list[dict[str, str]], str]]:
    """(place, messages before the answer, answer) of each row: `messages`, or `instruction` and `response`."""
    empty = True
    for place, row in read_rows(path, "sft.path"):
        empty = False
        try:
            messages = _messages(row)
        except ValueError as error:
            raise ValueError(f"{path}, {place}: {error}") from None
        yield f"{path}, {place}", chat.with_system(messages[:-1], system_prompt), messages[-1]["content"]
    if empty:
        raise ValueError(f"sft.path: {path} has no rows")


def _messages(row: dict[str, Any]) -> list[dict[str, str]]:
    if "messages" not in row and "instruction" in row:
        answer = {"role": "assistant", "content": row.get("response")}
        return [*chat.prompt(row["instruction"], "instruction"), chat.message(answer, "response")]
    messages = chat.checked(row.get("messages"), "messages", last="assistant")
    if len(messages) < 2:
        raise ValueError("messages must have a turn before the assistant's")
    return messages
