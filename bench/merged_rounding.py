"""What bfloat16 leaves of an adapter's update: in the trainer's passes, in peft's, and in merged weights.

usage: python bench/merged_rounding.py RUN/final/adapter BASE [--task FILE.toml] [--problems 16] [--scales 0.1,1]

BASE is the model that the run started from. It samples a response to each held-out problem; for the adapter's product
times each scale a row follows with mean and largest differences in nats of the log-probs of these tokens, all from the
same adapter on the same base with float32 weights and arithmetic:
  update     the base without the adapter, also in float32: what there is to lose;
  trainer    base and adapter in bfloat16 as they train;
  peft       the same with peft's pass, which adds the adapter's output to a layer's that is rounded already;
  merged     the weights that an engine gets, in bfloat16;
  nearest    merged weights rounded to nearest, which the trainer does not do;
and last the difference between trainer and merged.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor
from transformers import AutoTokenizer

from prime_trainer.config.load import load
from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.tasks import load_task
from prime_trainer.models import loading, placement
from prime_trainer.models.forward import hidden_states
from prime_trainer.report import markdown

Row = tuple[Tensor, int]
"""Token ids [1, L] of a prompt with its response, and the length of the prompt."""


def plain(path: Path, dtype: str) -> Any:
    return loading.load_model(ModelConfig.model_validate({"path": str(path), "dtype": dtype, "device": "cpu"}))


def policy(base: Path, adapter: Path, dtype: str, scale: float) -> Any:
    """The adapter on the base, its product times `scale`."""
    cfg = ModelConfig.model_validate({"path": str(base), "dtype": dtype, "device": "cpu", "adapter": {"path": adapter}})
    view = placement.put_adapter(placement.load_base(cfg), "policy", cfg, 0)
    with torch.no_grad():
        for factors in view.factors().values():
            factors.b.mul_(scale)
    return view


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, conversations: list[list[dict[str, str]]]) -> list[Row]:
    rows = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 48}
        rows.append((model.generate(ids, **options, pad_token_id=tokenizer.eos_token_id), ids.shape[1]))
    return rows


@torch.no_grad()
def log_probs(model: Any, rows: list[Row]) -> Tensor:
    """[all response tokens], from float32 logits whatever the dtype of the model."""
    weight, found = model.get_output_embeddings().weight.float(), []
    for ids, start in rows:
        logits = hidden_states(model, ids, None, None)[0, start - 1 : -1].float() @ weight.t()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0])
    return torch.cat(found)


def with_weights(base: Path, tensors: dict[str, Tensor]) -> Any:
    model = plain(base, "bfloat16")
    model.load_state_dict(tensors, strict=False)  # a tied head is the embedding's
    return model


def of_scale(base: Path, adapter: Path, scale: float, rows: list[Row], of_base: Tensor) -> dict[str, str]:
    """Mean (largest) differences; `of_base` are its own log-probs."""
    precise, trained = policy(base, adapter, "float32", scale), policy(base, adapter, "bfloat16", scale)
    exact, trainer = log_probs(precise, rows), log_probs(trained, rows)
    merged = log_probs(with_weights(base, dict(loading.pairs(loading.named_tensors(trained)))), rows)
    sums = {name: value.bfloat16() for name, value in loading.pairs(loading.named_tensors(precise))}
    nearest = log_probs(with_weights(base, sums), rows)
    for layer in trained.base.model.modules():
        if isinstance(layer, Linear):
            layer.__class__ = Linear
    pairs = {
        "update": (of_base, exact),
        "trainer": (trainer, exact),
        "peft": (log_probs(trained, rows), exact),
        "merged": (merged, exact),
        "nearest": (nearest, exact),
        "trainer and merged": (trainer, merged),
    }
    apart = {name: (one - other).abs() for name, (one, other) in pairs.items()}
    return {name: f"{each.mean():.4f} ({each.max():.2f})" for name, each in apart.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--task", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "demo.toml")
    parser.add_argument("--problems", type=int, default=16)
    parser.add_argument("--scales", default="0.1,1")
    args = parser.parse_args()
    cfg = load(args.task, ["--model.path", str(args.base)])
    problems = load_task(cfg.task, cfg.seed).held_out()[: args.problems]
    torch.manual_seed(cfg.seed)
    rounded = plain(args.base, "bfloat16")
    rows = sampled(rounded, AutoTokenizer.from_pretrained(args.base), [list(each.messages) for each in problems])
    of_base = log_probs(plain(args.base, "float32"), rows)
    apart = (log_probs(rounded, rows) - of_base).abs()
    print(f"{len(of_base)} tokens; the base itself in bfloat16: {apart.mean():.4f} ({apart.max():.2f})\n")
    found = [
        (scale, of_scale(args.base, args.adapter, float(scale), rows, of_base)) for scale in args.scales.split(",")
    ]
    print(markdown.grid(["product", *found[0][1]], [[scale, *row.values()] for scale, row in found]))


if __name__ == "__main__":
    main()
