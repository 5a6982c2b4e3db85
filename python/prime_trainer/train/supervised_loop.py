"""The loop of a supervised stage: a fixed number of optimizer steps on a cosine schedule, with exact resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

from ..config.sections import CheckpointConfig, MetricsConfig
from ..run import checkpoint
from ..run.metrics import MetricsWriter, Stage
from ..run.progress import progress_bar
from ..run.stop_signal import stop_signal
from ..scale.transfer import Values, fetched
from .nonfinite_guard import Skips, TooManySkipped
from .trainable import Trainable


def fit(
    run: checkpoint.RunSettings,
    saving: CheckpointConfig,
    tracking: MetricsConfig,
    stage: Stage,
    state: dict[str, Any] | None,
    trainable: Trainable,
    total: int,
    backward: Callable[[int], Values],
    *,
    warmup: float,
    skips: Skips,
    floor: float = 0.0,
    evaluate: Callable[[int], dict[str, float]] = lambda step: {},
    finish: Callable[[], None] = lambda: None,
    models: Mapping[str, str],
) -> None:
    """Takes `total` steps, those of `state` (from `checkpoint.begin`) already done.

    `backward(step)`, from 0, leaves the gradients of that step and returns its metrics, `loss` among them;
    `evaluate(step)`, after the step, adds to them; `finish()`, after the last, saves the model. Ctrl-C stops after the
    current step and leaves a checkpoint for `--resume`; so does any error between two steps, TooManySkipped among
    them, when gradients have not been finite for as many steps as `skips` allows. `models` are the fingerprints of
    what the run starts from.
    """
    step, whole, saved = 0, True, -1
    if state is not None:
        trainable.load_state_dict(state["trainable"])
        skips.load_state_dict(state["skips"])
        step = saved = state["step"]
    checkpoint.write_config(run, models)

    def save() -> None:
        nonlocal saved
        state = {"step": step, "config": run.model_dump_json(), "models": dict(models)}
        state |= {"trainable": trainable.state_dict(), "skips": skips.state_dict()}
        checkpoint.save(run.output, step, state, saving.keep)
        saved = step

    # A run that was killed before its first checkpoint starts again: what it logged goes, too.
    record = MetricsWriter(
        run.output, step if run.resume else None, stages=(stage,), tracking=tracking,
        config=json.loads(run.model_dump_json()),
    )  # fmt: skip
    with closing(record) as metrics, progress_bar(stage, total, step) as bar, stop_signal() as stop:
        try:
            while step < total and not stop.is_set():
                found = backward(step)
                scale = cosine(step + 1, total, warmup, floor)
                whole = False
                norm = trainable.step(scale)
                values = fetched(found) | {"lr": trainable.lr * scale, "grad_norm": norm}
                values |= skips.note(trainable.taken_skips())
                step, whole = step + 1, True
                values |= evaluate(step)
                metrics.log(stage, step, values)
                skips.check(step, None, run.output)
                bar.advance(f"loss {values['loss']:.3f}")
                if step < total and (stop.is_set() or (saving.every and step % saving.every == 0)):
                    save()
            finish()
        except checkpoint.CheckpointError:
            raise
        except Exception as error:
            # A checkpoint of the last step would resume into a finished run.
            if step != saved and not (isinstance(error, TooManySkipped) and step == total):
                checkpoint.leave(step, whole, save)
            raise
    if skips.total:
        print(f"{stage}: {skips.total} of {step} steps had no finite gradient and were skipped")


def cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over the share `warmup` of the `total` steps, then a cosine to `floor`; `step` counts from 1."""
    rise = max(1, round(total * warmup))
    if step <= rise:
        return step / rise
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise + 1)))
    return floor + (1 - floor) * fall
