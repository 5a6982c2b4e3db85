"""Model directories as they are met: what is refused, and errors in them as one line that names the directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config.sections import ModelConfig
from ..run.jsonl import read_object

GENERATION = "generation_config.json"
READ_SAFELY = {"trust_remote_code": False, "local_files_only": True}
"""Of every `from_pretrained`: a model's directory is data, and what it lacks is not fetched from elsewhere. Left out,
`trust_remote_code` is asked on the terminal where a directory has code of its own (`auto_map`)."""


class ModelError(ValueError):
    """The model cannot be loaded; the message names the key, what it was and what to do."""


@contextmanager
def reading(cfg: ModelConfig) -> Iterator[None]:
    """Turns whatever damaged or foreign files raise into a ModelError of one line."""
    try:
        yield
    except (ModelError, ModuleNotFoundError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        told = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in told:
            told = "it needs code of its own (auto_map), and code that comes with a model is never run"
        told = _damaged(Path(cfg.path)) or told
        file = "" if cfg.gguf_file is None else f" ({cfg.gguf_file})"
        raise ModelError(f"{cfg.key} = {cfg.path!r}{file} cannot be read: {told:.300}") from error


def _damaged(directory: Path) -> str | None:
    """The first file of a model directory that is not what its name says, and why."""
    from safetensors import safe_open

    for path in sorted(directory.glob("*.json")):
        try:
            read_object(path)
        except (OSError, ValueError) as error:
            return str(error)
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:
            return f"{path}: {error}"
    return None


def check_directory(directory: Path, cfg: ModelConfig) -> None:
    """Raises ModelError for an adapter, and for weights that are pickled: those can hold code."""
    if (directory / GENERATION).exists():
        read_object(directory / GENERATION)  # a damaged one would be left out without a word
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{cfg.key} = {cfg.path!r} is an adapter (adapter_config.json): give its base as model.path and the "
            "adapter as model.adapter.path, or merge it into its model first"
        )
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(path.name for suffix in ("bin", "pt", "pth", "ckpt") for path in directory.glob(f"*.{suffix}"))
    if pickled:
        raise ModelError(
            f"{cfg.key} = {cfg.path!r} has its weights in {pickled[0]}, a pickle, which can hold code and is not "
            "read: save the model as safetensors"
        )


def check_loaded(found: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Raises ModelError that names the weights which the files lack, have beyond the model's, or have in another shape.

    `found` is transformers' loading info, where heads tied to their embedding are no longer missing. A weight that is
    missing would otherwise be drawn at random.
    """
    shapes = [f"{name} ({list(was)} in place of {list(wanted)})" for name, was, wanted in found["mismatched_keys"]]
    wrong = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing", found["missing_keys"]),
            ("that the model does not have", found["unexpected_keys"]),
            ("of another shape", shapes),
            ("not readable", found["error_msgs"]),
        )
        if names
    ]
    if wrong:
        raise ModelError(
            f"{cfg.key} = {cfg.path!r}: its weights are not those of its configuration: {'; '.join(wrong)}"
        )


def gguf_left_out(path: Path, model: Any) -> list[str]:
    """The tensors of a GGUF file that are no weights of the model: transformers passes over them without a word.

    Experts, which are merged, and the frequencies of rotary embeddings, which are computed, have no name of their own.
    """
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    reader = GGUFReader(path)
    kind = TENSOR_PROCESSORS.get(model.config.model_type, TensorProcessor)
    known = get_gguf_hf_weights_map(model, kind(config=model.config.to_dict()))
    return [t.name for t in reader.tensors if t.name not in known and "exp" not in t.name and "rope_" not in t.name]


def _some(names: Any, most: int = 4) -> str:
    shown = sorted(map(str, names))
    return ", ".join(shown[:most]) + (", .." if len(shown) > most else "")
