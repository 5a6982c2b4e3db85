"""What merging an adapter into bfloat16 weights does to a policy's log-probs, apart from the arithmetic of either.

usage: python bench/merged_rounding.py RUN/final BASE [--task examples/demo.toml] [--problems 48]

RUN/final is the merged policy of a run with `model.adapter` and holds `adapter/`, BASE the model that it started from.
The merged policy samples a response to each held-out problem; the mean and the largest difference of its tokens'
log-probs follow, between
  merged     bfloat16 weights, bfloat16 arithmetic: what vLLM serves and `final/` is;
  trainer    bfloat16 base and adapter side by side: what trains;
  weights    the merged weights in float32 arithmetic: their rounding alone;
  nearest    the same with the sums rounded to nearest, which the trainer does not do;
  exact      base and adapter in float32 arithmetic.
Before that, how much of the adapter's update rounding leaves.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from prime_trainer.config.load import load
from prime_trainer.data.tasks import load_task
from prime_trainer.report import markdown

Row = tuple[Tensor, int]
"""Token ids [1, L] of a prompt with its response, and the length of the prompt."""


def causal_lm(path: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def side_by_side(base: Path, adapter: Path, dtype: torch.dtype) -> Any:
    model = PeftModel.from_pretrained(causal_lm(base, dtype), adapter, autocast_adapter_dtype=False).eval()
    for name, parameter in model.named_parameters():  # not the frequencies of rotary embeddings, which are float32
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model


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
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    found = []
    for ids, start in rows:
        hidden = plain.model(ids).last_hidden_state[0, start - 1 : -1]
        logits = hidden.float() @ plain.lm_head.weight.float().T
        found.append(logits.log_softmax(-1).gather(-1, ids[0, start:, None])[:, 0])
    return torch.cat(found)


@torch.no_grad()
def rounding(base: Path, final: Path, exact: dict[str, Tensor]) -> Iterator[str]:
    """The share of the adapted weights that each way of rounding left as they were; its norm, that of the update 1."""
    before, after = (causal_lm(path, torch.float32).state_dict() for path in (base, final))
    names = [name for name in exact if not torch.equal(exact[name], before[name])]
    if not names:
        raise SystemExit(f"{final}/adapter: expected changes of weights of {base}, got none")
    update = sum(float((before[name] - exact[name]).square().sum()) for name in names) ** 0.5
    nearest = {name: exact[name].bfloat16().float() for name in names}
    for what, weights in (("as saved", after), ("to nearest", nearest)):
        same = sum(int((weights[name] == before[name]).sum()) for name in names)
        apart = sum(float((weights[name] - exact[name]).square().sum()) for name in names) ** 0.5
        share = 100 * same / sum(exact[name].numel() for name in names)
        yield f"{what}: {share:.0f} % of the adapted weights unchanged; rounding is {apart / update:.2f} of the update"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("final", type=Path)
    parser.add_argument("base", type=Path)
    parser.add_argument("--task", type=Path, default=Path(__file__).resolve().parents[1] / "examples" / "demo.toml")
    parser.add_argument("--problems", type=int, default=48)
    args = parser.parse_args()
    cfg = load(args.task, ["--model.path", str(args.base)])
    problems = load_task(cfg.task, cfg.seed).held_out()[: args.problems]
    torch.manual_seed(cfg.seed)
    merged, adapter = causal_lm(args.final, torch.bfloat16), args.final / "adapter"
    rows = sampled(merged, AutoTokenizer.from_pretrained(args.final), [list(each.messages) for each in problems])
    found = {
        "merged": log_probs(merged, rows),
        "trainer": log_probs(side_by_side(args.base, adapter, torch.bfloat16), rows),
        "weights": log_probs(merged.float(), rows),
        "exact": log_probs(precise := side_by_side(args.base, adapter, torch.float32), rows),
    }
    exact = precise.merge_and_unload().state_dict()
    print("\n".join(rounding(args.base, args.final, exact)))
    merged.load_state_dict({name: value.bfloat16().float() for name, value in exact.items()})
    found["nearest"] = log_probs(merged, rows)
    cells = []
    for one, other in combinations(found, 2):
        apart = (found[one] - found[other]).abs()
        cells.append([one, other, f"{apart.mean():.4f}", f"{apart.max():.2f}"])
    print(f"{len(found['exact'])} tokens, mean log-prob {found['exact'].mean():.3f}\n")
    print(markdown.grid(["", "", "mean, nats", "most"], cells))


if __name__ == "__main__":
    main()
