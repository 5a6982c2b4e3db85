"""Real steps of TRL's GRPO trainer on a CPU, on its own functions or on ours; the same prompts, seeds and weights.

usage: python bench/trl_steps.py MODEL_DIRECTORY RESULT.json [--patch | --part] [--steps 5] [--tokens 64]
           [--dtype float32]

Writes the trainer's log of each step, the seconds of every call of its log-prob part (forward, and forward and
backward), and the most memory that this process held. bench/trl_table.py runs it both ways and makes the table.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch

KEYS = ("loss", "grad_norm", "entropy", "kl")


class Stopwatch:
    """Stands where TRL calls its log-prob function, and times what is there: TRL's or ours."""

    def __init__(self, function):
        self.function = function
        self.forward, self.backward, self.tokens = [], [], []

    def apply(self, hidden, *arguments):
        times = {}

        class After(torch.autograd.Function):
            @staticmethod
            def forward(ctx, logp):
                return logp.view_as(logp)

            @staticmethod
            def backward(ctx, grad):
                times["start"] = time.perf_counter()
                return grad

        class Before(torch.autograd.Function):
            @staticmethod
            def forward(ctx, hidden):
                return hidden.view_as(hidden)

            @staticmethod
            def backward(ctx, grad):
                self.backward.append(time.perf_counter() - times["start"])
                return grad

        inner = Before.apply(hidden)
        start = time.perf_counter()
        logp, *rest = self.function.apply(inner, *arguments)
        self.forward.append(time.perf_counter() - start)
        self.tokens.append(len(hidden))
        return After.apply(logp), *rest


def parity(completion_ids, **_):
    """A reward that differs within a group and needs no text: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def run(model: Path, *, patch: bool, steps: int, tokens: int, dtype: str) -> dict:
    """Train, and return the logs, the times and the memory."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import utils

    from prime_kernels.integrations import trl as integration

    integration.unpatch()
    if patch:
        integration.patch(replace_fused=True)
    function = utils._ChunkedLogProbFunction
    watch = utils._ChunkedLogProbFunction = Stopwatch(function)
    prompts = [[{"role": "user", "content": f"What is {a} + {a + 7}? Explain."}] for a in range(11, 11 + 2 * steps)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                num_generations=4,
                num_iterations=2,  # so that the ratio to the old policy is not always 1
                beta=0.04,  # and the loss not always 0 in value
                temperature=0.9,
                max_completion_length=tokens,
                learning_rate=1e-5,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                bf16=False,
                seed=0,
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
                processing_class=AutoTokenizer.from_pretrained(model, padding_side="left"),
                reward_funcs=parity,
                args=config,
                train_dataset=Dataset.from_dict({"prompt": prompts}),
            )
            start = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - start
    finally:
        utils._ChunkedLogProbFunction = function
        integration.unpatch()
    logs = [{key: entry[key] for key in KEYS} for entry in trainer.state.log_history if "loss" in entry]
    return {
        "patched": patch,
        "logs": logs,
        "seconds": seconds,
        "forward_seconds": watch.forward,
        "backward_seconds": watch.backward,
        "tokens": watch.tokens,
        "peak_MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def part(model: Path, *, dtype: str, tokens: int = 1024, rounds: int = 7) -> dict:
    """The log-prob part alone on the model's head, TRL's and ours in turn: seconds of every call, and MiB held."""
    from transformers import AutoModelForCausalLM
    from trl.trainer import utils

    from prime_kernels._bench.timing import peak_bytes
    from prime_kernels.integrations import trl as integration

    weight = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).get_output_embeddings().weight
    hidden = torch.randn(tokens, weight.shape[1], dtype=weight.dtype).requires_grad_()
    targets = torch.randint(len(weight), (tokens,))
    chunk, outputs = utils._CHUNKED_LOGPROB_CHUNK_SIZE, ("log_probs", "entropy")
    functions = {"TRL": utils._ChunkedLogProbFunction}
    integration.patch(replace_fused=True)
    functions["patched"] = utils._ChunkedLogProbFunction
    integration.unpatch()
    found: dict = {"tokens": tokens, "threads": torch.get_num_threads()}

    def once(function) -> tuple[float, float]:
        start = time.perf_counter()
        logp = function.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, outputs)[0]
        middle = time.perf_counter()
        logp.sum().backward()
        end = time.perf_counter()
        hidden.grad = weight.grad = None
        return middle - start, end - middle

    for name, function in functions.items():
        once(function)
        peak = peak_bytes(lambda f=function: once(f), torch.device("cpu"))
        found[name] = {"forward": [], "backward": [], "peak_MiB": peak / 2**20}
    for _ in range(rounds):
        for name, function in functions.items():
            for key, seconds in zip(("forward", "backward"), once(function), strict=True):
                found[name][key].append(seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--patch", action="store_true")
    parser.add_argument("--part", action="store_true", help="no training: the log-prob part alone, both ways in turn")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = vars(parser.parse_args())
    model, result = options.pop("model"), options.pop("result")
    alone = options.pop("part")
    found = part(model, dtype=options["dtype"]) if alone else run(model, **options)
    result.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
