"""Adapter directories, as peft has them, with a record of the base that the adapter was trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...run.jsonl import read_object
from ..model_files import ModelError
from .views import AdaptedModel, _peft

if TYPE_CHECKING:
    from peft import LoraConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base.json"
"""The path, dtype and fingerprint of the base."""
FOLDER = "adapter"
"""Of a saved model: the merged model's directory has its adapter in this one."""
_NONE: dict[str, Any] = {"bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}}
_OFF = (
    "use_dora",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
)


def check(directory: Path, key: str) -> None:
    """Raises ModelError unless there is an adapter in `directory`, which `key` names."""
    if not directory.is_dir():
        raise ModelError(f"{key} must be an adapter directory, got {str(directory)!r}: no such directory")
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            inside = f"; its folder {FOLDER} is one" if (directory / FOLDER / CONFIG).is_file() else ""
            raise ModelError(f"{key} = {str(directory)!r} is no adapter directory: it has no {name}{inside}")


def read_config(directory: Path, key: str) -> LoraConfig:
    """peft's settings of the adapter. Raises ModelError for what is no plain LoRA."""
    check(directory, key)
    peft, found = _peft(), read_object(directory / CONFIG)
    if found.get("peft_type") != "LORA":
        raise ModelError(
            f"{key} = {str(directory)!r}: expected an adapter of peft_type LORA, got {found.get('peft_type')!r}"
        )
    other = [name for name, value in _NONE.items() if (found.get(name) or value) != value]
    other += [name for name in _OFF if found.get(name)]
    if other:
        raise ModelError(f"{key} = {str(directory)!r} is no plain LoRA: {CONFIG} sets {', '.join(sorted(other))}")
    config: LoraConfig = peft.LoraConfig(
        r=found["r"], lora_alpha=found["lora_alpha"], target_modules=found["target_modules"], lora_dropout=0.0,
        use_rslora=bool(found.get("use_rslora")), fan_in_fan_out=bool(found.get("fan_in_fan_out")), bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return config


def check_base(directory: Path, key: str, model_path: str, fingerprint: Callable[[str], str]) -> None:
    """Raises ModelError where the adapter was trained on other files than the base's, of which `fingerprint(dtype)`
    gives the hash. An adapter from elsewhere keeps no record: there the shapes alone can tell."""
    path = directory / BASE
    if not path.is_file():
        return
    record = read_object(path)
    if record.get("fingerprint") != fingerprint(str(record.get("dtype"))):
        raise ModelError(
            f"{key} = {str(directory)!r} was trained on another base than model.path = {model_path!r}: its {BASE} "
            f"names {record.get('path')!r}"
        )


@torch.no_grad()
def read_weights(model: AdaptedModel, directory: Path, key: str) -> None:
    """Reads the adapter's weights into `model`. Raises ModelError unless the file has exactly those."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        saved = load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{key}: {directory / WEIGHTS} cannot be read: {error}") from None
    wanted: dict[str, Tensor] = {}
    for name, factors in model.factors().items():
        path = name.removesuffix(".weight")
        wanted |= {f"base_model.model.{path}.lora_{k}.weight": v for k, v in (("A", factors.a), ("B", factors.b))}
    odd = sorted(wanted.keys() ^ saved.keys())
    odd += [name for name in wanted.keys() & saved.keys() if wanted[name].shape != saved[name].shape]
    if odd:
        raise ModelError(
            f"{key} = {str(directory)!r} is not of this base: {len(odd)} of its tensors are missing, unknown or of "
            f"another shape, such as {odd[0]}"
        )
    for name, value in wanted.items():
        if not torch.isfinite(saved[name]).all():
            raise ModelError(f"{key} = {str(directory)!r}: {name} is not finite")
        value.copy_(saved[name])


def write(model: AdaptedModel, directory: Path, tensors: Mapping[str, Tensor], fingerprint: str) -> None:
    """The adapter, of which `tensors` are the weights, and the record of its base."""
    from safetensors.torch import save_file

    assert model.adapter is not None
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
    cfg, config = model.base.cfg, model.base.configs[model.adapter]
    found = config.to_dict() | {"base_model_name_or_path": cfg.path, "inference_mode": True}
    found = {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}
    (directory / CONFIG).write_text(json.dumps(found, indent=2, sort_keys=True, default=str) + "\n")
    record = {"path": cfg.path, "dtype": cfg.dtype, "fingerprint": fingerprint}
    (directory / BASE).write_text(json.dumps(record, indent=2) + "\n")
