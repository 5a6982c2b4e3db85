"""Models on the meta device: sizes and shapes without data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config.sections import ModelConfig
from .loading import _locate, _quiet
from .model_files import READ_SAFELY, reading
from .protocols import CausalLM


def meta_model(cfg: ModelConfig) -> CausalLM:
    """The model without data: its sizes and the shapes of its passes. Attention keeps its inputs and output only."""
    from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

    directory, gguf = _locate(cfg)
    with _quiet(), reading(cfg):
        config = AutoConfig.from_pretrained(directory, **({"gguf_file": gguf} if gguf else {}), **READ_SAFELY)
        AttentionInterface.register("meta", _meta_attention)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                config, dtype=getattr(torch, cfg.dtype), attn_implementation="meta", trust_remote_code=False
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
