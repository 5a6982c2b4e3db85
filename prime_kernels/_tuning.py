"""Defaults measured on one device: a file that ``python -m prime_kernels bench`` writes.

``PRIME_KERNELS_TUNING=FILE`` makes them the defaults of tensors on that kind of device: the backend of each operation
where neither the argument nor ``use_backend`` nor ``PRIME_KERNELS_BACKEND`` names one, and sizes of tiles of logits.
Without the variable nothing is read, and nothing is ever measured unasked.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

ENVIRONMENT_VARIABLE = "PRIME_KERNELS_TUNING"
FORMAT = "prime_kernels tuning, version 1"
TILES = ("forward_elements", "backward_elements", "kept_bytes", "fused_bytes", "fused_columns")
# Of the tiles whose softmax "triton" takes in the epilogue of the product; without it the product is a library's.
FUSED_COLUMNS = (128, 256)
LARGEST_TILE = 2**40


class Tuning(NamedTuple):
    """Defaults on one device with certain versions."""

    device_type: str
    """Of the tensors: "cpu" or "cuda"."""
    device: str
    """Name of the processor or GPU, as :func:`device_name` has it."""
    versions: dict[str, str]
    """As :func:`versions` has them."""
    backends: dict[str, str]
    """The backend of an operation; those that are not named keep the order of :mod:`prime_kernels`."""
    tiles: dict[str, int]
    """Sizes of TILES; those that are not named keep theirs."""

    def written(self) -> str:
        """The text of a tuning file."""
        return json.dumps({"format": FORMAT, **self._asdict()}, indent=1) + "\n"


_read: dict[str, Tuning] = {}
_matched: set[str] = set()
_trial: Tuning | None = None


def device_name(device_type: str) -> str:
    """Name of the current GPU, or of the processor with the number of torch's threads."""
    if device_type == "cuda":
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """What the measurements depend on: these kernels, torch, triton and CUDA."""
    from prime_kernels import __version__

    found = {"prime_kernels": __version__, "torch": torch.__version__, "cuda": torch.version.cuda or "none"}
    try:
        return found | {"triton": metadata.version("triton")}
    except metadata.PackageNotFoundError:
        return found | {"triton": "none"}


def backend(op: str, device_type: str) -> str | None:
    """The tuned backend of an operation; None without a file for this kind of device."""
    tuning = active(device_type)
    return None if tuning is None else tuning.backends.get(op)


def tile(name: str, device_type: str, default: int) -> int:
    """The tuned size of a tile, or the default."""
    tuning = active(device_type)
    return default if tuning is None else tuning.tiles.get(name, default)


def active(device_type: str) -> Tuning | None:
    """The tuning of this kind of device, if the environment names a file and it is for that kind.

    Raises:
        ValueError: the file cannot be read, is damaged, or was measured on another device or with other versions.
    """
    if _trial is not None:
        return _trial if _trial.device_type == device_type else None
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return None
    if path not in _read:
        _read[path] = read(path)
    tuning = _read[path]
    if tuning.device_type != device_type:
        return None
    if path not in _matched:
        _match(tuning, path)
        _matched.add(path)
    return tuning


def none(device_type: str = "cpu") -> Tuning:
    """One that names nothing: :func:`trial` of it makes the built-in defaults hold, and no file is read."""
    return Tuning(device_type, "", {}, {}, {})


@contextmanager
def trial(tuning: Tuning) -> Iterator[None]:
    """This tuning in place of a file's, while it is measured."""
    global _trial
    before, _trial = _trial, tuning
    try:
        yield
    finally:
        _trial = before


def said() -> tuple[bool, str]:
    """(whether it can be used or none is named, one line about the file that the environment names)."""
    path = os.environ.get(ENVIRONMENT_VARIABLE)
    if not path:
        return True, f"none ({ENVIRONMENT_VARIABLE} is not set)"
    try:
        tuning = read(path)
        if tuning.device_type == "cuda" and not torch.cuda.is_available():
            return True, f"{path}, for CUDA tensors, not used here"
        _match(tuning, path)
    except ValueError as error:
        return False, str(error)
    return True, f"{path}, for {'CUDA' if tuning.device_type == 'cuda' else 'CPU'} tensors"


def read(path: str) -> Tuning:
    """A tuning file, whatever device it is for. Raises ValueError for one that is missing or damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _wrong(path, "a file that can be read", str(error)) from error
    except ValueError as error:
        raise _wrong(path, "JSON, as written by `python -m prime_kernels bench`", str(error)) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise _wrong(path, f"format {FORMAT!r}", repr(got))
    expected = {"format", *Tuning._fields}
    if set(content) != expected:
        raise _wrong(path, f"the keys {', '.join(sorted(expected))}", ", ".join(sorted(content)))
    for name in ("device_type", "device"):
        if not isinstance(content[name], str):
            raise _wrong(path, f"text as {name}", repr(content[name]))
    if content["device_type"] not in ("cpu", "cuda"):
        raise _wrong(path, "device_type 'cpu' or 'cuda'", repr(content["device_type"]))
    _require_values(path, content)
    return Tuning(**{name: content[name] for name in Tuning._fields})


def _require_values(path: str, content: dict[str, Any]) -> None:
    from prime_kernels._dispatch import BACKENDS, OPERATIONS

    for name in ("versions", "backends", "tiles"):
        if not isinstance(content[name], dict):
            raise _wrong(path, f"a table as {name}", repr(content[name]))
    for op, chosen in content["backends"].items():
        if op not in OPERATIONS or chosen not in BACKENDS:
            raise _wrong(path, "backends of operations of this version", f"{op!r}: {chosen!r}")
    for name, size in content["tiles"].items():
        sound = isinstance(size, int) and not isinstance(size, bool) and 0 < size <= LARGEST_TILE
        if name == "fused_columns" and size not in FUSED_COLUMNS:
            raise _wrong(path, f"fused_columns of {' or '.join(map(str, FUSED_COLUMNS))}", repr(size))
        if name not in TILES or not sound:
            raise _wrong(path, f"tiles of {', '.join(TILES)} in 1 to {LARGEST_TILE}", f"{name!r}: {size!r}")


def _match(tuning: Tuning, path: str) -> None:
    here = device_name(tuning.device_type)
    if tuning.device != here:
        raise _wrong(path, f"the tuning of this device, {here!r}", f"that of {tuning.device!r}")
    if tuning.versions != versions():
        raise _wrong(path, f"a tuning with these versions, {_listed(versions())}", _listed(tuning.versions))


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted(found.items()))


def _wrong(path: str, expected: str, got: str) -> ValueError:
    return ValueError(
        f"PRIME_KERNELS_TUNING={path}: expected {expected}, got {got}; "
        "`python -m prime_kernels bench` writes a new one, and without the variable the defaults hold"
    )
