"""Checkpoints: written to a temporary directory and renamed, so that a partial one is never loaded."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config.load import REMOVED
from ..config.run_config import RunConfig
from ..errors import RunError
from ..scale.ranks import SINGLE, Ranks, restarts
from . import atomic_files, checkpoint_files, unchanged
from .jsonl import parse_json, read_object
from .metrics import METRICS
from .provenance import environment

CONFIG = "config.json"
FINGERPRINTS = "fingerprints.json"
"""Of the models that a run starts from, or that scores are from, by what the models are for."""
_NAME = re.compile(r"step_\d{6,}")
FREE_ON_RESUME = {
    "steps",
    "resume",
    "output",
    "wait_lock",
    "eval",
    "checkpoint",
    "metrics",
    "micro_batch_tokens",
    "scale",
}
"""Settings that a resumed run may change: its length, place, memory use and reporting."""
LATER_SECTIONS = {"metrics"}
"""Those that runs of the first version do not have. What they say changes no run."""


class RunSettings(Protocol):
    """What of a run's configuration decides where it writes and which run it is."""

    @property
    def output(self) -> Path: ...

    @property
    def resume(self) -> bool: ...

    def model_dump_json(self, *, indent: int | None = None) -> str:
        """Returns the whole resolved configuration."""
        ...


class CheckpointError(RunError):
    """A checkpoint could not be written; the one before it is whole."""


def begin(cfg: RunSettings, models: Mapping[str, str]) -> dict[str, Any] | None:
    """The state to go on from, None for a new run. Refuses to overwrite a run or to resume another one."""
    found = resume_point(cfg, models)
    return None if found is None else load(found)


def resume_point(cfg: RunSettings, models: Mapping[str, str]) -> Path | None:
    """The checkpoint to go on from, None for a new run or one that died before its first checkpoint.

    `models` are the fingerprints of what the run starts from. Raises ValueError where `cfg` would overwrite a run or go
    on as another one.
    """
    if not cfg.resume:
        if (cfg.output / METRICS).exists():
            raise ValueError(f"{cfg.output} already holds a run; give another --output, or --resume to continue it")
        return None
    root = cfg.output / "checkpoints"
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"--resume: a folder of checkpoints is expected, got a file: {root}")
    _recover(cfg.output)
    found = _all(cfg.output)
    if found:
        checkpoint_files.verify(found[-1], only=checkpoint_files.STATE)
        where, state = found[-1] / checkpoint_files.STATE, checkpoint_files.read_plain(found[-1])
        if not isinstance(state, dict) or not isinstance(state.get("config"), str):
            raise ValueError(f"{where} is not the state of a run")
        _same_config(state["config"], cfg, where)
        same_models(state.get("models"), models)
        return found[-1]
    if not (cfg.output / CONFIG).exists():
        raise ValueError(f"--resume: {cfg.output} has no checkpoint to go on from")
    _same_config((cfg.output / CONFIG).read_bytes(), cfg, cfg.output / CONFIG)
    kept = cfg.output / FINGERPRINTS
    same_models(read_object(kept) if kept.exists() else None, models)
    return None


def restarted(cfg: RunSettings) -> bool:
    """Whether torchrun has restarted the ranks (--max-restarts) of a run that had begun: it then resumes."""
    return restarts() > 0 and (cfg.output / CONFIG).exists()


def _same_config(saved: str | bytes, cfg: RunSettings, where: Path) -> None:
    old, new = parse_json(saved, str(where)), json.loads(cfg.model_dump_json())
    sections = [name for name, value in new.items() if isinstance(value, dict)]
    known = [name for name in sections if name not in LATER_SECTIONS]
    if not isinstance(old, dict) or not all(isinstance(old.get(name), dict) for name in known):
        raise ValueError(f"{where}: not the configuration of a run")
    for name in known:  # what a run of an earlier version had no key for
        old[name] = RunConfig.model_fields[name].default.model_dump(mode="json") | old[name]
    for config in (old, new):
        config["rollout"].pop("server", None)  # where the engine runs changes nothing
        for section in ("policy", "sft", "train_prm"):  # nor does how many skipped steps are too many
            config[section].pop("max_skipped", None)
        for section, _, name in (key.partition(".") for key in REMOVED):
            config[section].pop(name, None)
    unchanged.check(
        old, new, [key for key in new if key not in FREE_ON_RESUME], "--resume: the configuration has changed"
    )


def same_models(saved: Any, now: Mapping[str, str]) -> None:
    """Raises ValueError that names the models whose files are not what they were; says so where a run kept nothing."""
    if not isinstance(saved, dict):
        print(
            "--resume: the run kept no fingerprints of its models: whether they are still the same is not known",
            file=sys.stderr,
        )
        return
    changed = [name for name in now if saved.get(name) != now[name]]
    if changed:
        raise ValueError(f"--resume: the files of {', '.join(changed)} are not what they were when the run began")


def write_config(cfg: RunSettings, models: Mapping[str, Any]) -> None:
    """The resolved configuration, the models it starts from and what the run runs on, beside what it writes."""
    cfg.output.mkdir(parents=True, exist_ok=True)
    atomic_files.replace_file(cfg.output / FINGERPRINTS, json.dumps(models, indent=1))
    atomic_files.replace_file(cfg.output / "environment.json", json.dumps(environment(), indent=2))
    atomic_files.replace_file(cfg.output / CONFIG, cfg.model_dump_json(indent=2))


def leave(step: int, whole: bool, save: Callable[[], None]) -> None:
    """After an error that ends a run: a checkpoint of `step` by `save`, or a line that says why there is none.

    The error stays what the run ends with, whatever happens here.
    """
    if not whole:
        print(f"step {step + 1} failed half done: no checkpoint of it; --resume goes on from the last", file=sys.stderr)
        return
    try:
        save()
    except Exception as error:
        print(f"no checkpoint of step {step} could be left: {error}", file=sys.stderr)
    else:
        print(f"a checkpoint of step {step} is left; --resume goes on from there", file=sys.stderr)


class Saver:
    """Writes checkpoints in a thread during training, one at a time, each from a copy of the state."""

    def __init__(self, run_dir: Path, keep: int, ranks: Ranks = SINGLE, saved_step: int = 0) -> None:
        """`saved_step` is that of the newest checkpoint on the disk, 0 for none."""
        self.run_dir, self.keep, self.saved_step = run_dir, keep, saved_step
        # The thread's collectives use a separate group.
        self.ranks = replace(ranks, group=ranks.saving)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Starts checkpoints/step_N. Raises CheckpointError if the one before could not be written."""
        self.wait()
        plain, tensors = checkpoint_files.split(state)
        tensors = checkpoint_files.staged(tensors) if tensors else {}
        self._pending = self._thread.submit(_write, self.run_dir, step, plain, tensors, self.keep, self.ranks)
        self.saved_step = step

    def check(self) -> None:
        """Raises CheckpointError as soon as it is known that a checkpoint could not be written."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Blocks until the checkpoint is on disk. Raises CheckpointError if it could not be written."""
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
        root.mkdir(exist_ok=True)  # not its parents: where the run's folder is gone, so is the run
        for torn in root.glob(".step_*.partial"):
            shutil.rmtree(torn, ignore_errors=True)
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
        if not run_dir.is_dir():
            raise CheckpointError(f"the checkpoint of step {step} could not be written: {run_dir} is gone") from None
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
    """Oldest first. Whatever else lies in the folder, put or left there by others, is none of the run's."""
    found = [path for path in (run_dir / "checkpoints").glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))
