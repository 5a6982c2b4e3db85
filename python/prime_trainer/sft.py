"""Supervised warm-up on chat data: mean negative log-likelihood of the answers' tokens, prompts masked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import prime_kernels as pk

from . import checkpoint, demonstrations, models
from .batch import Batch, Group, Response
from .config import RunConfig
from .interrupt import stop_signal
from .metrics import MetricsWriter
from .progress import progress_bar
from .rollout import derive_seed
from .score import predicting
from .tasks import load_task


def run(cfg: RunConfig) -> Path:
    """Trains `cfg.model` on the demonstrations or on `sft.path`; returns the directory of the saved model.

    Ctrl-C stops after the step at hand and leaves a checkpoint for `--resume` beside the model as it is then.
    """
    state = checkpoint.begin(cfg)
    tokenizer = models.load_tokenizer(cfg.model)
    examples = _examples(cfg, tokenizer)
    model = models.load_model(cfg.model)
    trainable = models.Trainable(model, lr=cfg.sft.lr, betas=(0.9, 0.95), grad_clip=cfg.sft.grad_clip)
    size = min(cfg.sft.batch_size, len(examples))
    per_epoch = math.ceil(len(examples) / size)
    total, step = cfg.sft.epochs * per_epoch, 0
    if state is not None:
        trainable.load_state_dict(state["trainable"])
        step = state["step"]
    checkpoint.write_config(cfg)
    metrics = MetricsWriter(cfg.output, resume_step=step if cfg.resume else None, stages=("sft",))
    with progress_bar("sft", total, step) as bar, stop_signal() as stop:
        while step < total and not stop.is_set():
            epoch, at = divmod(step, per_epoch)
            generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "sft", epoch))
            order = torch.randperm(len(examples), generator=generator).tolist()
            batch = Batch([examples[i] for i in order[at * size : (at + 1) * size]], model.device)
            loss = 0.0
            for micro in batch.micro_batches(range(len(batch.groups)), cfg.micro_batch_tokens):
                at = models.head(model, predicting(model, micro))
                ids = batch.ids[micro.tokens]
                part = pk.linear_nll(at.hidden, at.weight, ids, bias=at.bias, denominator=batch.num_tokens)
                part.backward()
                loss += part.item()
            step += 1
            scale = schedule(step, total, cfg.sft.warmup)
            norm = trainable.step(scale)
            values = {"loss": loss, "lr": cfg.sft.lr * scale, "tokens": batch.num_tokens, "grad_norm": norm}
            metrics.log("sft", step, values)
            bar.advance(f"loss {loss:.3f}")
            if step < total and (stop.is_set() or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0)):
                state = {"step": step, "config": cfg.model_dump_json(), "trainable": trainable.state_dict()}
                checkpoint.save(cfg.output, step, state, cfg.checkpoint.keep)
    final = cfg.output / "final"
    models.save(model, tokenizer, final)
    metrics.close()
    return final


def schedule(step: int, total: int, warmup: float) -> float:
    """Linear warm-up over the share `warmup` of the steps, then a cosine to zero."""
    rise = max(1, round(total * warmup))
    if step <= rise:
        return step / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise + 1)))


def _examples(cfg: RunConfig, tokenizer: Any) -> list[Group]:
    if cfg.sft.path is not None:
        pairs = list(_chat_rows(cfg.sft.path))
    else:
        made = demonstrations.make(
            load_task(cfg.task, cfg.seed), cfg.sft.demonstrations, cfg.sft.worked_fraction, cfg.seed
        )
        pairs = [(problem.messages, answer) for problem, answer in made]
    eos = tokenizer.eos_token_id
    groups = []
    for messages, answer in pairs:
        prompt = models.render(tokenizer, messages)
        ids = [*tokenizer.encode(answer, add_special_tokens=False), eos]
        if len(prompt) + len(ids) <= cfg.sft.max_length:
            groups.append(Group(prompt, [Response(ids)]))
    if not groups:
        where = cfg.sft.path or "the task"
        raise ValueError(
            f"no SFT example from {where} fits sft.max_length = {cfg.sft.max_length} tokens ({len(pairs)} were read)"
        )
    return groups


def _chat_rows(path: Path) -> Iterator[tuple[list[dict[str, str]], str]]:
    """(messages before the answer, answer) of each row of a JSONL or parquet file with a `messages` column."""
    if not path.is_file():
        raise FileNotFoundError(f"sft.path: no such file: {path}")
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    empty = True
    for number, row in rows:
        empty = False
        messages = row.get("messages") if isinstance(row, dict) else None
        if not _is_chat(messages):
            raise ValueError(
                f"{path}, row {number}: field 'messages' must be a chat of role and content that ends with the "
                "assistant's turn"
            )
        yield messages[:-1], messages[-1]["content"]
    if empty:
        raise ValueError(f"sft.path: {path} has no rows")


def _is_chat(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 1
        and all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in messages)
        and messages[-1].get("role") == "assistant"
    )


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: not JSON: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"sft.path: {path} is not a parquet file: {error}") from None
    yield from enumerate(table.to_pylist(), 1)
