"""The loop of a supervised stage: a fixed number of optimizer steps on a cosine schedule, with exact resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import checkpoint
from .config import RunConfig
from .interrupt import stop_signal
from .metrics import MetricsWriter, Stage
from .models import Trainable
from .progress import progress_bar
from .schedule import cosine


def fit(
    cfg: RunConfig,
    stage: Stage,
    state: dict[str, Any] | None,
    trainable: Trainable,
    total: int,
    backward: Callable[[int], dict[str, float]],
    *,
    warmup: float,
    floor: float = 0.0,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
) -> None:
    """Takes `total` steps, those of `state` (from `checkpoint.begin`) already done.

    `backward(step)`, from 0, leaves the gradients of that step and returns its metrics, `loss` among them;
    `evaluate(step)`, after the step, adds to them. Ctrl-C stops after the step at hand and leaves a checkpoint for
    `--resume`.
    """
    step = 0
    if state is not None:
        trainable.load_state_dict(state["trainable"])
        step = state["step"]
    checkpoint.write_config(cfg)
    metrics = MetricsWriter(cfg.output, resume_step=None if state is None else step, stages=(stage,))
    with progress_bar(stage, total, step) as bar, stop_signal() as stop:
        while step < total and not stop.is_set():
            values = backward(step)
            step += 1
            scale = cosine(step, total, warmup, floor)
            values |= {"lr": trainable.lr * scale, "grad_norm": trainable.step(scale)}
            values |= evaluate(step)
            metrics.log(stage, step, values)
            bar.advance(f"loss {values['loss']:.3f}")
            if step < total and (stop.is_set() or (cfg.checkpoint.every and step % cfg.checkpoint.every == 0)):
                state = {"step": step, "config": cfg.model_dump_json(), "trainable": trainable.state_dict()}
                checkpoint.save(cfg.output, step, state, cfg.checkpoint.keep)
    metrics.close()
