"""Supervised warm-up on chat data: mean negative log-likelihood of the answers' tokens, prompts masked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import demonstrations, models
from .batch import Batch, Group, Response
from .config import RunConfig
from .interrupt import stop_signal
from .metrics import MetricsWriter
from .progress import progress_bar
from .rollout import derive_seed
from .score import log_probs
from .tasks import load_task


def run(cfg: RunConfig) -> Path:
    """Trains `cfg.model` on the demonstrations or on `sft.path`; returns the directory of the saved model."""
    tokenizer = models.load_tokenizer(cfg.model)
    examples = _examples(cfg, tokenizer)
    model = models.load_model(cfg.model)
    trainable = models.Trainable(model, lr=cfg.sft.lr, betas=(0.9, 0.95), grad_clip=cfg.sft.grad_clip)
    size, epochs = min(cfg.sft.batch_size, len(examples)), cfg.sft.epochs
    total = epochs * math.ceil(len(examples) / size)
    step = 0
    metrics = MetricsWriter(cfg.output, resume_step=None)
    with progress_bar("sft", total) as bar, stop_signal() as stop:
        for epoch in range(epochs):
            generator = torch.Generator().manual_seed(derive_seed(cfg.seed, "sft", epoch))
            order = torch.randperm(len(examples), generator=generator).tolist()
            for at in range(0, len(order), size):
                step += 1
                batch = Batch([examples[i] for i in order[at : at + size]], model.device)
                loss = 0.0
                for micro in batch.micro_batches(range(len(batch.groups)), cfg.micro_batch_tokens):
                    part = -log_probs(model, micro, batch.ids[micro.tokens]).sum() / batch.num_tokens
                    part.backward()
                    loss += part.item()
                scale = schedule(step, total, cfg.sft.warmup)
                norm = trainable.step(scale)
                values = {"loss": loss, "lr": cfg.sft.lr * scale, "tokens": batch.num_tokens, "grad_norm": norm}
                metrics.log("sft", step, values)
                bar.advance(f"loss {loss:.3f}")
                if stop.is_set():
                    break
            if stop.is_set():
                break
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
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: Any = enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    else:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = ((i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip())
    empty = True
    for number, row in rows:
        empty = False
        messages = row.get("messages") if isinstance(row, dict) else None
        if not messages or messages[-1].get("role") != "assistant" or len(messages) < 2:
            raise ValueError(
                f"{path}, row {number}: field 'messages' must be a chat that ends with the assistant's turn"
            )
        yield messages[:-1], messages[-1]["content"]
    if empty:
        raise ValueError(f"sft.path: {path} has no rows")
