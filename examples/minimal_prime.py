"""PRIME in one file: online RL with an implicit process reward model, on prime_kernels and transformers.

    python examples/minimal_prime.py MODEL [--steps 10]

MODEL is the directory of a chat model that answers in \\boxed{}, such as runs/demo-0/sft/final of `make demo`. The task
is to add three or four numbers. Float32, one device, no checkpoints: `prime-trainer rl` is the same algorithm with all
of that, and the first steps of both agree to 1e-5 (tests/examples). Source: PRIME (arXiv 2502.01456), sections 2 and 4.
"""

from __future__ import annotations

import argparse
import copy
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import prime_kernels as pk


@dataclass(frozen=True)
class Settings:
    prompts: int = 16  # groups in a batch
    n: int = 6  # responses to a prompt
    max_new_tokens: int = 48
    low: float = 0.1  # groups with a mean outcome in [low, high] are kept
    high: float = 0.9
    max_rounds: int = 4
    beta: float = 0.05
    prm_lr: float = 3e-5
    prm_clip: float = 10.0
    policy_lr: float = 1e-5
    policy_clip: float = 1.0
    minibatches: int = 2


@dataclass(frozen=True)
class Group:
    """A prompt, the responses sampled for it (token ids), and whether each response is right (0 to 1)."""

    prompt: list[int]
    responses: list[list[int]]
    outcomes: list[float]


@dataclass(frozen=True)
class Batch:
    """Responses packed end to end. B responses, T response tokens, G groups, padded rows of L tokens."""

    input_ids: Tensor  # int64 [B, L], prompt and response, padded on the right
    attention_mask: Tensor  # int64 [B, L]
    predicts: Tensor  # bool [B, L], where the hidden state predicts a response token
    ids: Tensor  # int64 [T]
    cu_seqlens: Tensor  # int64 [B + 1], in tokens
    cu_groups: Tensor  # int64 [G + 1], in responses
    outcomes: Tensor  # float32 [B]


def pack(groups: Sequence[Group], device: torch.device) -> Batch:
    rows = [(group.prompt, response) for group in groups for response in group.responses]
    shape = (len(rows), max(len(prompt) + len(response) for prompt, response in rows))
    input_ids, attention_mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
    predicts = torch.zeros(shape, dtype=torch.bool)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        predicts[row, len(prompt) - 1 : end - 1] = True
    ids = input_ids[:, 1:][predicts[:, :-1]]
    outcomes = torch.tensor([outcome for group in groups for outcome in group.outcomes])
    cu_seqlens = offsets([len(response) for _, response in rows])
    cu_groups = offsets([len(group.responses) for group in groups])
    return Batch(*(x.to(device) for x in (input_ids, attention_mask, predicts, ids, cu_seqlens, cu_groups, outcomes)))


def offsets(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def head(model: Any, batch: Batch) -> pk.Head:
    """The hidden states [T, H] that predict the response tokens, and the output layer; logits are never stored."""
    hidden = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
    layer = model.get_output_embeddings()
    return pk.Head(hidden[batch.predicts], layer.weight, layer.bias)


class Prime:
    """The policy, its PRM and the frozen reference, all of which start from the weights of `model`."""

    def __init__(self, model: Any, settings: Settings) -> None:
        self.policy, self.prm, self.settings = model, copy.deepcopy(model), settings
        self.ref = copy.deepcopy(model).requires_grad_(False)
        options = {"betas": (0.9, 0.999), "weight_decay": 0.0}
        self.policy_optimizer = torch.optim.AdamW(self.policy.parameters(), lr=settings.policy_lr, **options)
        self.prm_optimizer = torch.optim.AdamW(self.prm.parameters(), lr=settings.prm_lr, **options)

    def step(self, groups: Sequence[Group], generator: torch.Generator) -> dict[str, Tensor]:
        """One PRIME update on sampled groups; `generator` shuffles the policy's minibatches."""
        batch, beta = pack(groups, self.policy.device), self.settings.beta

        # 1. Score, and update the PRM from outcomes with the same forward pass.
        with torch.no_grad():
            ref, policy = head(self.ref, batch), head(self.policy, batch)
        scored = pk.linear_log_ratios(head(self.prm, batch), ref, batch.ids, policy=policy)
        prm = pk.prm_loss(scored.log_ratio, batch.outcomes, batch.cu_seqlens, cu_groups=batch.cu_groups, beta=beta)
        prm.loss.backward()
        update(self.prm, self.prm_optimizer, self.settings.prm_clip)

        process_rewards = beta * scored.log_ratio.detach()  # 2. RLOO over process rewards and outcomes.
        advantages = pk.rloo_advantages(process_rewards, batch.outcomes, batch.cu_seqlens, batch.cu_groups).advantages

        # 3. PPO with clipping, one optimizer step for each minibatch of groups.
        losses = []
        order = torch.randperm(len(groups), generator=generator)
        for members in order.tensor_split(min(self.settings.minibatches, len(groups))):
            part = pack([groups[g] for g in members], self.policy.device)
            tokens = torch.cat([tokens_of(batch, g) for g in members])
            at, old_logp = head(self.policy, part), scored.policy_logp[tokens]
            ppo = pk.linear_ppo_loss(at.hidden, at.weight, part.ids, old_logp, advantages[tokens], bias=at.bias)
            ppo.loss.backward()
            update(self.policy, self.policy_optimizer, self.settings.policy_clip)
            losses.append(ppo.loss.detach())
        found = {"prm_loss": prm.loss.detach(), "prm_pair_accuracy": prm.pair_accuracy}
        found |= {"policy_loss": torch.stack(losses).mean(), "reward": batch.outcomes.mean()}
        return found | {"process_rewards": process_rewards, "advantages": advantages}


def tokens_of(batch: Batch, group: int) -> Tensor:
    first, last = batch.cu_groups[group], batch.cu_groups[group + 1]
    return torch.arange(int(batch.cu_seqlens[first]), int(batch.cu_seqlens[last]), device=batch.ids.device)


def update(model: Any, optimizer: torch.optim.Optimizer, clip: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def sample(model: Any, tokenizer: Any, prompt: list[int], settings: Settings) -> list[list[int]]:
    """`n` responses at temperature 1, without top-k or top-p; each ends with its stop token or at the limit."""
    ids, eos = torch.tensor([prompt], device=model.device), tokenizer.eos_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos,
        pad_token_id=eos, num_return_sequences=settings.n, max_new_tokens=settings.max_new_tokens,
    )  # fmt: skip
    rows = [row[len(prompt) :].tolist() for row in out]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def verify(response: str, answer: int) -> float:
    boxes = re.findall(r"\\boxed\{\s*(-?\d{1,9})\s*\}", response)
    return float(bool(boxes) and int(boxes[-1]) == answer)


def rollout(model: Any, tokenizer: Any, rng: random.Random, settings: Settings) -> list[Group]:
    """Groups of the model's responses to sums, some right and some wrong in each; at most `settings.prompts`."""
    groups: list[Group] = []
    for _ in range(settings.max_rounds * settings.prompts):
        terms = [rng.randint(0, 10) for _ in range(rng.randint(3, 4))]
        messages = [{"role": "user", "content": f"Calculate {' + '.join(map(str, terms))}."}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompt = tokenizer.encode(text, add_special_tokens=False)
        responses = sample(model, tokenizer, prompt, settings)
        outcomes = [verify(tokenizer.decode(ids, skip_special_tokens=True), sum(terms)) for ids in responses]
        if settings.low <= sum(outcomes) / len(outcomes) <= settings.high:
            groups.append(Group(prompt, responses, outcomes))
        if len(groups) == settings.prompts:
            break
    if groups:
        return groups
    raise RuntimeError("no group has both right and wrong responses: start from a model that is sometimes right")


def main(argv: list[str] | None = None, settings: Settings | None = None) -> Prime:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    tokenizer, settings = AutoTokenizer.from_pretrained(args.model), settings or Settings()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    loaded = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    prime, rng, generator = Prime(loaded, settings), random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    for k in range(1, args.steps + 1):
        found = prime.step(rollout(prime.policy, tokenizer, rng, settings), generator)
        print(f"step {k}:", ", ".join(f"{name} {v:.3f}" for name, v in found.items() if v.ndim == 0), flush=True)
    return prime


if __name__ == "__main__":
    main()
