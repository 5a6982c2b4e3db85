"""A run's state on disk: written beside the last one and renamed, so that a torn checkpoint is never picked up."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..config.run_config import RunConfig
from ..errors import RunError
from ..scale.ranks import SINGLE, Ranks, restarts
from . import atomic_files, checkpoint_files
from .metrics import METRICS
from .provenance import environment

CONFIG = "config.json"
FREE_ON_RESUME = {"steps", "resume", "output", "eval", "checkpoint", "micro_batch_tokens", "scale"}
"""What a resumed run may change and still be the same run: its length, its place, its memory and its reporting."""


class CheckpointError(RunError):
    """A checkpoint could not be written; the one before it is whole."""


def begin(cfg: RunConfig) -> dict[str, Any] | None:
    """The state to go on from, None for a new run. Refuses to overwrite a run or to resume another one."""
    found = resume_point(cfg)
    return None if found is None else load(found)


def resume_point(cfg: RunConfig) -> Path | None:
    """The checkpoint to go on from, None for a new run or one that died before its first checkpoint.

    Raises ValueError where `cfg` would overwrite a run or go on as another one.
    """
    if not cfg.resume:
        if (cfg.output / METRICS).exists():
            raise ValueError(f"{cfg.output} already holds a run; give another --output, or --resume to continue it")
        return None
    _recover(cfg.output)
    found = _all(cfg.output)
    if found:
        checkpoint_files.verify(found[-1], only=checkpoint_files.STATE)
        _same_config(checkpoint_files.read_plain(found[-1])["config"], cfg)
        return found[-1]
    if not (cfg.output / CONFIG).exists():
        raise ValueError(f"--resume: {cfg.output} has no checkpoint to go on from")
    _same_config((cfg.output / CONFIG).read_text(), cfg)
    return None


def restarted(cfg: RunConfig) -> RunConfig:
    """As the run goes on when torchrun has started its ranks anew (--max-restarts): with the same words, but later."""
    anew = restarts() > 0 and (cfg.output / CONFIG).exists()
    return cfg.model_copy(update={"resume": True}) if anew else cfg


def _same_config(saved: str, cfg: RunConfig) -> None:
    old, new = json.loads(saved), json.loads(cfg.model_dump_json())
    for config in (old, new):
        config["rollout"].pop("server", None)  # where the engine runs changes nothing
        for section in ("policy", "sft", "train_prm"):  # nor does how many skipped steps are too many
            config[section].pop("max_skipped", None)
    check_unchanged(old, new, [key for key in new if key not in FREE_ON_RESUME])


def check_unchanged(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> None:
    """Raises ValueError where a setting that decides the results is not what the interrupted run had."""
    changed = [key for key in keys if old.get(key) != new[key]]
    if changed:
        detail = "; ".join(f"{key}: {old.get(key)} -> {new[key]}" for key in changed)
        raise ValueError(f"--resume: the configuration has changed ({detail})")


def same_tokenizer(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError, naming the difference, unless both are `models.tokenizer_fingerprint` of the same one."""
    changed = [f"{key}: {saved.get(key)} -> {now[key]}" for key in now if saved.get(key) != now[key]]
    if changed:
        raise ValueError(f"--resume: the tokenizer has changed ({'; '.join(changed)})")


def write_config(cfg: RunConfig) -> None:
    """The resolved configuration and what the run runs on, beside what it writes."""
    cfg.output.mkdir(parents=True, exist_ok=True)
    atomic_files.replace_file(cfg.output / "environment.json", json.dumps(environment(), indent=2))
    atomic_files.replace_file(cfg.output / CONFIG, cfg.model_dump_json(indent=2))


class Saver:
    """Writes checkpoints while the training goes on; one at a time, each from a copy of the state as it was."""

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks = SINGLE) -> None:
        self.run_dir, self.keep = run_dir, keep
        # The thread's collectives go through a group of their own.
        self.ranks = replace(ranks, group=ranks.saving)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts checkpoints/step_N. Raises CheckpointError if the one before could not be written."""
        self.wait()
        plain, tensors = checkpoint_files.split(state)
        tensors = checkpoint_files.staged(tensors) if tensors else {}
        self._pending = self._thread.submit(_write, self.run_dir, step, plain, tensors, self.keep, self.ranks)

    def check(self) -> None:
        """Raises CheckpointError as soon as it is known that a checkpoint could not be written."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises CheckpointError if it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        self._thread.shutdown()


def save(run_dir: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Writes checkpoints/step_N and removes all but the newest `keep`."""
    return _write(run_dir, step, *checkpoint_files.split(state), keep, SINGLE)


def _write(run_dir: Path, step: int, plain: Any, tensors: dict[str, Any], keep: int, ranks: Ranks) -> Path:
    root = run_dir / "checkpoints"
    target = root / f"step_{step:06d}"
    partial = root / f".step_{step:06d}.partial"

    def prepare() -> None:
        root.mkdir(parents=True, exist_ok=True)
        for torn in root.glob(".step_*.partial"):
            shutil.rmtree(torn)
        partial.mkdir()

    def finish() -> None:
        atomic_files.replace_directory(partial, target)
        for passed in _all(run_dir)[:-keep]:
            passed.rename(passed.with_name(f".{passed.name}.partial"))  # half removed, it is not a checkpoint
            shutil.rmtree(passed.with_name(f".{passed.name}.partial"))

    try:
        ranks.once(prepare)
        checkpoint_files.write(partial, plain, tensors, ranks)
        ranks.once(finish)
    except BaseException as error:
        if ranks.first:
            shutil.rmtree(partial, ignore_errors=True)
        cause = _cause(error)
        if not isinstance(cause, OSError):
            raise
        left = [path.name for path in _all(run_dir)]
        kept = f"{left[-1]} is whole" if left else "there is none before it"
        free = shutil.disk_usage(run_dir).free / 2**30
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {root} ({free:.1f} GiB free): {cause}; {kept}"
        ) from None
    return target


def _cause(error: BaseException) -> BaseException:
    """What went wrong on some rank, out of what torch.distributed.checkpoint wraps around it."""
    failures = getattr(error, "failures", None)
    if failures:
        return _cause(next(iter(failures.values()))[0])
    if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error)):
        # torch.save does not say why its file came out shorter than what it wrote.
        return error.__context__ if isinstance(error.__context__, OSError) else OSError("a file could not be written")
    return error


def load(directory: Path, into: dict[str, Any] | None = None, ranks: Ranks = SINGLE) -> dict[str, Any]:
    """The state in `directory`, checked against its checksums; tensors go into those of `into` where it is given."""
    ranks = replace(ranks, group=ranks.saving)
    checkpoint_files.verify(directory, ranks)
    try:
        return checkpoint_files.read(directory, into, ranks)
    except BaseException as error:
        if not getattr(error, "failures", None):
            raise
        raise ValueError(f"the checkpoint {directory} does not fit this run: {_cause(error)}") from None


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest state, None where there is none."""
    found = _all(run_dir)
    return load(found[-1]) if found else None


def random_states() -> dict[str, Any]:
    """Those of Python and of torch, as plain data."""
    devices = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    return {"python": random.getstate(), "torch": torch.get_rng_state().tolist(), "cuda": devices}


def set_random_states(states: dict[str, Any]) -> None:
    """Restores what `random_states` gave; of devices, as many as there are."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(state, dtype=torch.uint8), device)


def _recover(run_dir: Path) -> None:
    """A crash between the two renames that replace a checkpoint leaves the old one beside its place."""
    for old in (run_dir / "checkpoints").glob(".step_*.old"):
        atomic_files.recover_directory(old)


def _all(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step_*"))
