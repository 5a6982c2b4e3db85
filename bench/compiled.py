"""What `model.compile` gains: forward and backward passes with compiled layers beside eager ones, in turn.

usage: python bench/compiled.py [--models demo,7b] [--tokens 1024] [--rounds 3] [--dtype bfloat16] [--backend inductor]

`demo` is SmolLM2-135M-Instruct, `7b` four layers of random weights with the widths of Qwen2.5-7B, anything else a model
directory. A pass takes groups of 8 responses of 64 tokens on prompts of 64, as many as fill it, laid out as the trainer
does. Seconds are medians of the process's own, by the CPU's clock where it has one thread; what the first compiled pass
takes more than the others is the compiler's. The last column is how far the log-probs lie apart, in nats.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.compilation import compile_layers
from prime_trainer.models.loading import SMOLLM2, load_model
from prime_trainer.report import markdown
from prime_trainer.scale.recomputation import recompute_activations
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs

COLUMNS = ("model", "layers", "s", "tokens/s", "speed, eager = 1", "first pass, s", "apart, mean / worst")
WAYS = {
    "eager, nothing recomputed": (False, "none"),
    'eager, "selective"': (False, "selective"),
    "compiled": (True, "none"),
}


def build(name: str, dtype: str) -> Any:
    if name != "7b":
        return load_model(ModelConfig(path=SMOLLM2 if name == "demo" else name, dtype=dtype, device="cpu"))
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
        num_hidden_layers=4, vocab_size=1000,
    )  # fmt: skip
    return Qwen2ForCausalLM._from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa").eval()


def clock() -> float:
    """Seconds of this process on a CPU, or of the wall where several threads work for it."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def one_pass(model: Any, batch: Batch) -> tuple[float, Tensor]:
    """Seconds of forward and backward, and the log-probs."""
    (micro,) = batch.micro_batches(range(len(batch.groups)), 10**6)
    begin = clock()
    found = log_probs(model, micro, batch.ids[micro.tokens])
    found.sum().backward()
    seconds = clock() - begin
    for parameter in model.parameters():
        parameter.grad = None
    return seconds, found.detach()


def measured(name: str, tokens: int, rounds: int, dtype: str, backend: str) -> list[list[str]]:
    models, generator = {}, torch.Generator().manual_seed(0)
    for way, (compiled, recomputed) in WAYS.items():
        model = build(name, dtype)
        for other in list(models.values())[:1]:  # one set of weights
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.data = theirs.data
        models[way] = recompute_activations(model, recomputed)
        if compiled:
            compile_layers(model, backend)

    vocabulary = min(1000, models[way].config.vocab_size)

    def ids() -> list[int]:
        return torch.randint(100, vocabulary, (64,), generator=generator).tolist()

    groups = [Group(ids(), [Response(ids()) for _ in range(8)]) for _ in range(max(1, tokens // 576))]
    batch = Batch.for_model(next(iter(models.values())), groups)
    first, times, values = {}, {way: [] for way in WAYS}, {}
    for way, model in models.items():
        begin = time.perf_counter()
        values[way] = one_pass(model, batch)[1]
        first[way] = time.perf_counter() - begin
    for _ in range(rounds):
        for way, model in models.items():
            times[way].append(one_pass(model, batch)[0])
    rows, eager = [], next(iter(WAYS))
    for way in WAYS:
        seconds = statistics.median(times[way])
        apart = (values[way] - values[eager]).abs()
        rows.append([
            name, way, f"{seconds:.2f}", f"{len(batch.ids) / seconds:.0f}",
            f"{statistics.median(times[eager]) / seconds:.2f}", f"{first[way]:.1f}",
            f"{apart.mean().item():.1e} / {apart.max().item():.1e}",
        ])  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="demo,7b")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    at = parser.parse_args()
    rows = [row for name in at.models.split(",") for row in measured(name, at.tokens, at.rounds, at.dtype, at.backend)]
    print(markdown.grid(COLUMNS, rows))


if __name__ == "__main__":
    main()
