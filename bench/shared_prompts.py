"""Passes over groups that share a prompt: tokens/s and peak memory of forward and backward, by layout and length.

    python bench/shared_prompts.py [--dtype bfloat16] [--layers 4] [--rounds 3] [--shapes 256x8x64 1024x8x3072 ..]

A shape is prompt x responses x tokens of each. The model has the layers of SmolLM2-135M, fewer of them, with random
weights. Layouts: each prompt once in a row (the trainer's), the same row with a mask of all pairs of tokens, the prompt
repeated for every response. Seconds are the best of the rounds, in turn; memory is the most bytes of tensors at once
beside the weights. Tokens/s count response tokens. FlexAttention is not among them: on CPUs it has no backward pass.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from prime_kernels._bench.timing import peak_of_tensors
from prime_trainer.models import traits
from prime_trainer.models.attention.segments import Segments

SIZES = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SHAPES = ("64x6x6", "256x8x64", "256x8x512", "1024x8x512", "1024x8x3072")
DENSE_LIMIT = 6000
"""Tokens above which a mask of all pairs is left out."""


def build(layers: int, dtype: torch.dtype, device: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=1000, num_hidden_layers=layers, max_position_embeddings=2**15)
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).to(device, dtype).eval()


def passes(model, prompt: int, n: int, own: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of a group in each layout; gradients are dropped."""
    row, masks = Segments(((prompt, (own,) * n),)), traits.of(model).masks
    ids = torch.randint(1000, (1, row.length), device=model.device)
    repeated = torch.randint(1000, (1, prompt + own), device=model.device)
    positions = row.positions[None].to(model.device)

    def work(times: int, *inputs) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                traits.hidden_states(model, *inputs).float().square().mean().backward()
            model.zero_grad()

        return run

    found = {"prompt once": work(1, ids, positions, row, masks)}
    if row.length <= DENSE_LIMIT:
        found["prompt once, mask of all pairs"] = work(1, ids, positions, row, replace(masks, kernel=None))
    return found | {"prompt repeated": work(n, repeated, None, None, None)}


def peak_mib(work: Callable[[], None], device: torch.device) -> float:
    """The most that was allocated at once."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_of_tensors(work) / 2**20


def seconds(work: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    words.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    words.add_argument("--device", default="cpu")
    words.add_argument("--layers", type=int, default=4)
    words.add_argument("--rounds", type=int, default=3)
    words.add_argument("--shapes", nargs="+", default=SHAPES)
    given = words.parse_args()
    model = build(given.layers, getattr(torch, given.dtype), given.device)
    print(
        f"{given.layers} layers of SmolLM2-135M, {given.dtype}, {given.device}, {torch.get_num_threads()} threads, "
        f"PyTorch {torch.__version__}; best of {given.rounds} rounds\n"
    )
    print("| prompt, responses | tokens of the row | layout | s | response tokens/s | peak MiB |")
    print("|---|--:|---|--:|--:|--:|")
    for shape in given.shapes:
        prompt, n, own = map(int, shape.split("x"))
        layouts = passes(model, prompt, n, own)
        memory = {name: peak_mib(work, model.device) for name, work in layouts.items()}
        best = dict.fromkeys(layouts, float("inf"))
        for _ in range(given.rounds):
            for name, work in layouts.items():
                best[name] = min(best[name], seconds(work, model.device))
        for name in layouts:
            print(
                f"| {prompt:,}, {n} of {own:,} | {prompt + n * own:,} | {name} | {best[name]:.2f} "
                f"| {n * own / best[name]:,.0f} | {memory[name]:,.0f} |"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
