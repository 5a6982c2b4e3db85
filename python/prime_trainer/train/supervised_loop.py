"""The loop of a supervised stage: a fixed number of optimizer steps on a cosine schedule, with exact resume."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from typing import Any

from ..config.sections import CheckpointConfig
from ..run import checkpoint
from ..run.metrics import MetricsWriter, Stage
from ..run.progress import progress_bar
from ..run.stop_signal import stop_signal
from .nonfinite_guard import Skips, TooManySkipped
from .trainable import Trainable


def fit(
    run: checkpoint.RunSettings,
    saving: CheckpointConfig,
    stage: Stage,
    state: dict[str, Any] | None,
    trainable: Trainable,
    total: int,
    backward: Callable[[int], dict[str, float]],
    *,
    warmup: float,
    skips: Skips,
    floor: float = 0.0,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
) -> None:
    """Takes `total` steps, those of `state` (from `checkpoint.begin`) already done.

    `backward(step)`, from 0, leaves the gradients of that step and returns its metrics, `loss` among them;
    `evaluate(step)`, after the step, adds to them. Ctrl-C stops after the step at hand and leaves a checkpoint for
    `--resume`; so does TooManySkipped, when gradients have not been finite for as many steps as `skips` allows.
    """
    step = 0
    if state is not None:
        trainable.load_state_dict(state["trainable"])
        skips.load_state_dict(state["skips"])
        step = state["step"]
    checkpoint.write_config(run)

    def save() -> None:
        state = {"step": step, "config": run.model_dump_json(), "trainable": trainable.state_dict()}
        checkpoint.save(run.output, step, state | {"skips": skips.state_dict()}, saving.keep)

    record = MetricsWriter(run.output, resume_step=None if state is None else step, stages=(stage,))
    with closing(record) as metrics, progress_bar(stage, total, step) as bar, stop_signal() as stop:
        while step < total and not stop.is_set():
            values = backward(step)
            step += 1
            scale = cosine(step, total, warmup, floor)
            values |= {"lr": trainable.lr * scale, "grad_norm": trainable.step(scale)}
            values |= skips.note(trainable.taken_skips())
            values |= evaluate(step)
            metrics.log(stage, step, values)
            try:
                skips.check(step, None, run.output)
            except TooManySkipped:
                if step < total:  # one at the end would resume into a finished run
                    save()
                raise
            bar.advance(f"loss {values['loss']:.3f}")
            if step < total and (stop.is_set() or (saving.every and step % saving.every == 0)):
                save()
    if skips.total:
        print(f"{stage}: {skips.total} of {step} steps had no finite gradient and were skipped")


def cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over the share `warmup` of the `total` steps, then a cosine to `floor`; `step` counts from 1."""
    rise = max(1, round(total * warmup))
    if step <= rise:
        return step / rise
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise + 1)))
    return floor + (1 - floor) * fall
