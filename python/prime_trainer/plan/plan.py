"""Memory and traffic of a run before it starts: counted on a model without data (meta device), not guessed from names.

Sizes are of one GPU with everything in shards over all of them, at the moment of each stage that takes most: tensors
that are alive, without what an allocator loses between them. Attention is taken to keep its inputs and output, as flash
and efficient kernels do; gradients of the passes before are taken to be there, as from the second pass of an optimizer
step on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..config.run_config import RunConfig
from ..config.sections import COUPLED_KINDS
from ..models import placement, traits
from ..report.markdown import grid
from ..scale import recomputation
from .footprint import (
    Passes,
    Shape,
    Sizes,
    Trained,
    drawing_bytes,
    head_bytes,
    passes_of,
    score_tile_bytes,
    shape_of,
    trained_of,
)

GIB = 2**30
MASTER_BYTES, ADAM_BYTES, GRAD_BYTES = 4, 8, 4

Parts = dict[str, float]
LAYOUTS: dict[traits.Layout, str] = {
    "shared": "a prompt once for the responses that share its pass",
    "rows": "one response a row, as its layers keep a state",
    "varlen": "sequences end to end without padding",
}


@dataclass(frozen=True)
class Plan:
    """Bytes by stage on one GPU, bytes sent by one GPU in a step, by what for."""

    shape: Shape
    memory: dict[str, Parts]
    traffic: dict[str, float]
    passes: int
    """Forward passes of one rank over its share of a step."""
    row: int
    """Tokens of the longest pass."""
    layout: traits.Layout
    """In which the model is expected to be read."""


def make(cfg: RunConfig, gpus: int, prompt_tokens: int) -> Plan:
    """The plan of `cfg` on `gpus` GPUs for prompts of `prompt_tokens` and responses of `rollout.max_new_tokens`."""
    models = placement.without_data(cfg.model, cfg.prm, cfg.needs)
    model = models.policy
    layout = traits.expected_layout(model, cfg.model.attention)
    shape = shape_of(models.whole, models.head_columns)
    compute = torch.empty(0, dtype=getattr(torch, cfg.model.dtype)).element_size()
    cfg = _launched(cfg, gpus)
    offload, needs = set(cfg.scale.offload), cfg.needs
    ranks = gpus if cfg.scale.shard else 1
    length = prompt_tokens + cfg.rollout.max_new_tokens
    laid = _laid_out(cfg, gpus, prompt_tokens, layout)
    recomputation.recompute_activations(model, cfg.scale.activation_checkpointing)
    policy, prm = (trained_of(each) for each in (model, models.prm or model))
    adapted = models.whole is not model
    sizes = Sizes(
        compute, compute if cfg.model.logits_dtype == "input" else 4, "cpu" if cfg.model.device == "cpu" else "cuda"
    )
    work = _Work(
        shape, passes_of(model, laid.row), sizes, ranks, ranks > 1 or bool(offload), laid.responses,
        ranks > 1 and cfg.scale.vocab_parallel_head,
    )  # fmt: skip

    def states(trained: Trained) -> float:
        # Of whole copies, one in the compute dtype beside its masters.
        return (MASTER_BYTES + ADAM_BYTES + compute * (not work.sharded)) * trained.parameters / ranks

    plain = compute * models.base_parameters / ranks
    held = {
        "base": plain if adapted else 0.0,
        "policy, masters and AdamW": 0.0 if "policy" in offload else states(policy),
        "PRM, masters and AdamW": states(prm) if needs.prm and "prm" not in offload else 0.0,
        "reference": plain if needs.reference and not adapted and "reference" not in offload else 0.0,
    }
    memory = {"rollout": held}
    if cfg.rollout.engine == "transformers":
        memory["rollout"] = held | work.sampling(
            min(max(1, cfg.rollout.batch_size // cfg.rollout.n), math.ceil(cfg.rollout.prompts_per_step / gpus)),
            cfg.rollout.n, prompt_tokens, length,
        )  # fmt: skip
        problems = min(cfg.eval.batch_size, math.ceil(cfg.task.eval_size / gpus))
        memory["evaluation"] = held | work.sampling(problems, 1, prompt_tokens, length)
    scoring = int(needs.reference) + int(needs.old_logp)
    if needs.prm and cfg.prm.update != "none":
        memory["score and PRM update"] = held | work.update(prm, fused=False, offloaded="prm" in offload)
    else:
        memory["score"] = held | (work.score() if scoring or needs.prm else {})
    memory["policy update"] = held | work.update(
        policy, fused=needs.fused_policy_loss and not work.split, offloaded="policy" in offload
    )

    sent = (ranks - 1) / ranks
    gather = compute * shape.parameters * sent

    def backward_of(trained: Trained) -> float:
        """Bytes of a pass with gradients."""
        found = 2 * compute * shape.parameters * sent + GRAD_BYTES * trained.parameters * sent
        if work.split:
            mine = GRAD_BYTES * trained.head * (not shape.tied)
            found += (compute * hidden + 2 * GRAD_BYTES * hidden - compute * head - mine) * sent
        return found

    head, hidden = 0 if shape.tied else shape.head, ranks * work.tokens * shape.width
    if work.split:  # an untied head stays where it is; hidden states go to all, their gradients are summed over all
        gather += (compute * hidden - compute * head) * sent
    passes = laid.passes
    rounds = passes * cfg.policy.epochs
    # All log-ratios come before the first gradient where responses are coupled.
    again = int(cfg.prm.kind in COUPLED_KINDS and cfg.prm.update != "none")
    # The PRM scores while it updates; candidates are scored once more, when it has.
    after = int(needs.candidates and cfg.prm.update == "after")
    traffic = {
        "rollout: the policy gathered once": compute * shape.parameters * sent if ranks > 1 else 0.0,
        "score: forward passes of policy and reference": passes * scoring * gather,
        "PRM: forward, backward, gradients": passes * (backward_of(prm) + (again + after) * gather)
        if needs.prm
        else 0.0,
        "policy: forward, backward, gradients": rounds * backward_of(policy),
    }
    if ranks == 1 and gpus > 1:  # whole copies add their gradients up once an optimizer step
        ring = 2 * (gpus - 1) / gpus * GRAD_BYTES
        steps = cfg.prm.minibatches * int(needs.prm)
        traffic |= {"PRM: forward, backward, gradients": ring * prm.parameters * steps}
        traffic |= {"policy: forward, backward, gradients": ring * policy.parameters * cfg.policy.optimizer_steps}
    return Plan(shape, memory, traffic, passes, laid.row, layout)


class _Passes(NamedTuple):
    """How a rank's share of a step is laid out."""

    row: int
    """Tokens of the longest pass."""
    responses: int
    """Those of them that are responses'."""
    passes: int


def _laid_out(cfg: RunConfig, gpus: int, prompt: int, layout: traits.Layout) -> _Passes:
    """As `train.batch` fills its passes with responses that are all of the greatest length."""
    own, n, most = cfg.rollout.max_new_tokens, cfg.rollout.n, cfg.micro_batch_tokens
    groups = math.ceil(cfg.rollout.prompts_per_step / gpus)
    together = min(n, max(1, (most - prompt) // own)) if layout == "shared" else 1
    # Of each group, entries of `together` responses, and one of what is left.
    entry, left = prompt + together * own, n % together
    entries, rest = groups * (n // together), prompt + left * own
    a_pass = max(1, min(entries, most // entry))
    passes = math.ceil(entries / a_pass)
    fitting = max(0, most - a_pass * entry) // rest if left else 0
    beside = min(groups, fitting)
    over = max(0, groups - fitting * passes) if left else 0
    return _Passes(
        a_pass * entry + beside * rest, (a_pass * together + beside * left) * own,
        passes + math.ceil(over / max(1, most // rest)),
    )  # fmt: skip


def _launched(cfg: RunConfig, gpus: int) -> RunConfig:
    """As torchrun's ranks see it: there is no vLLM in process, which `auto` may have stood for without it."""
    if gpus == 1 or cfg.rollout.engine != "vllm":
        return cfg
    return cfg.model_copy(update={"rollout": cfg.rollout.model_copy(update={"engine": "transformers"})})


@dataclass(frozen=True)
class _Work:
    """What stages take beside the models that are held, each at the moment that takes most."""

    shape: Shape
    body: Passes
    sizes: Sizes
    ranks: int
    sharded: bool
    tokens: int
    """Response tokens of a pass."""
    split: bool
    """Whether each rank has its rows of the head for the tokens of all."""

    def update(self, trained: Trained, *, fused: bool, offloaded: bool) -> Parts:
        """`fused`: gradients come with the loss; `offloaded`: in shards on the CPU."""
        shape, c, f = self.shape, self.sizes.compute, GRAD_BYTES
        # A tied head in shards is summed apart from the embedding; its sum and theirs are both there.
        twice = trained.head if self.sharded and shape.tied else 0
        always = {"gradients": 0.0 if offloaded else f * (trained.parameters + twice) / self.ranks}
        kept, at_most = {"activations": self.body.kept} | always, {"activations": self.body.backward} | always
        cast = f if c != f else 0
        if self.split:
            mine, everyones = self._share()
            loss = head_bytes(mine, everyones, self.sizes, fused=False, frozen=not trained.head)
            loss["hidden states of all ranks"] = (c + cast) * everyones * shape.width  # summed over ranks in float32
            head = [
                kept | loss | {"gathered parameters": cast and c * mine.head},
                kept | {"gradients on their way": (c + cast) * mine.head * (trained.head > 0)},
            ]
        else:
            learns = trained.head or trained.head_adapter
            loss = head_bytes(shape.wide_head, self.tokens, self.sizes, fused, frozen=not learns) | self._wide_head()
            head = [
                kept | loss | {"gathered parameters": c * shape.head},
                kept | {"gradients on their way": (c + cast + f / self.ranks) * trained.head},
            ]
        if not self.sharded:  # the gradient of a tied head waits for the embedding's
            return _most(kept | loss, at_most | {"gradients on their way": c * trained.head * shape.tied})
        return _most(
            *head,
            # Layers: one at work, the next already there, the one before with its gradients in float32 on their way.
            at_most | {"gathered parameters": c * (shape.outside + 2 * shape.layer),
                       "gradients on their way": f * trained.layer},
            kept | {"gathered parameters": c * (shape.outside + shape.layer),
                    "gradients on their way": (c + f + f / self.ranks) * trained.layer},
            always | {"gradients on their way": (c + f + f / self.ranks) * trained.outside},
        )  # fmt: skip

    def score(self) -> Parts:
        """Passes without gradients, one model after the other."""
        shape, c = self.shape, self.sizes.compute
        hidden = float(2 * c * self.tokens * shape.wide_head.width)
        gathered = c * (shape.outside + 2 * shape.layer) if self.sharded else 0.0
        head, tokens = self._share() if self.split else (shape, self.tokens)
        others = {"hidden states of all ranks": c * tokens * shape.width} if self.split else {}
        return _most(
            {"activations": self.body.forward, "gathered parameters": gathered},
            {"logits": score_tile_bytes(head, tokens, self.sizes), "hidden states, head": hidden,
             "gathered parameters": c * head.head if self.sharded else 0.0} | others | self._wide_head(),
        )  # fmt: skip

    def _wide_head(self) -> Parts:
        """The head beside the columns of the adapter on it."""
        wide = self.shape.wide_head
        return {"head and its adapter": float(self.sizes.compute * wide.head)} if wide.head_columns else {}

    def _share(self) -> tuple[Shape, int]:
        """The model with this rank's rows of the head, and the tokens that they are for."""
        rows = self.shape.vocabulary // self.ranks
        return replace(self.shape, vocabulary=rows, head=rows * self.shape.width), self.ranks * self.tokens

    def sampling(self, prompts: int, n: int, prompt_tokens: int, length: int) -> Parts:
        """`prompts` are read, then `n` responses to each drawn side by side; a layer's keys are copied as they grow."""
        shape, c = self.shape, self.sizes.compute
        whole = {"whole policy": c * shape.parameters if self.sharded else 0.0}
        if self.sizes.logit > c:  # float32 logits of such weights are our own product
            whole |= self._wide_head()
        cache, logits = c * shape.cache_per_token * prompts * n * length, prompts * n * shape.vocabulary
        share = prompts * prompt_tokens / self.body.tokens
        return whole | _most(
            {"keys and values": c * shape.cache_per_token * prompts * prompt_tokens,
             "activations": share * self.body.forward},
            {"keys and values": cache * (1 + 1 / (2 * shape.layers)), "logits": self.sizes.logit * logits},
            {"keys and values": cache, "logits": drawing_bytes(shape, self.sizes) * prompts * n},
        )  # fmt: skip


def _most(*moments: Parts) -> Parts:
    return max(moments, key=lambda parts: sum(parts.values()))


def render(plan: Plan, cfg: RunConfig, gpus: int, memory_gib: float) -> str:
    """The plan as Markdown."""
    memory = plan.memory
    if _launched(cfg, gpus).rollout.engine == "vllm":
        share = {"vLLM in process": cfg.rollout.vllm.gpu_memory_utilization * memory_gib * GIB}
        asleep = set(memory) - {"rollout"} if cfg.rollout.vllm.sleep else set()
        memory = {stage: parts if stage in asleep else parts | share for stage, parts in memory.items()}
    lines = [
        f"{cfg.model.path}: {plan.shape.parameters / 1e9:.2f} billion parameters on {gpus} x {memory_gib:g} GiB, "
        f"{plan.passes} passes of {plan.row} tokens a rank and step, {LAYOUTS[plan.layout]}",
        "",
    ]
    table: list[list[str]] = []
    rows = dict.fromkeys(name for parts in memory.values() for name in parts)
    for name in rows:
        values = [parts.get(name, 0.0) for parts in memory.values()]
        if any(values):
            table.append([name, *(f"{v / GIB:.1f}" if v else "" for v in values)])
    totals = [sum(parts.values()) / GIB for parts in memory.values()]
    table.append(["**sum**", *(f"**{total:.1f}**" for total in totals)])
    lines.append(grid(["GiB on one GPU", *memory], table, numbers=True).rstrip())
    worst = max(totals)
    if worst <= 0.9 * memory_gib:
        lines += ["", f"It fits: {worst:.1f} GiB at most, a tenth of {memory_gib:g} GiB left to the allocator."]
    else:
        lines += ["", f"It does not fit: {worst:.1f} GiB where 90 % of {memory_gib:g} GiB is to be had. {_advice(cfg)}"]
    sent = [[name, f"{value / GIB:.1f}"] for name, value in plan.traffic.items() if value]
    lines += ["", grid(["GiB sent by one GPU in a step", ""], sent, numbers=True).rstrip()]
    return "\n".join(lines)


def _advice(cfg: RunConfig) -> str:
    ways = ["more GPUs"]
    if not cfg.scale.shard:
        ways.append("scale.shard = true")
    if cfg.scale.activation_checkpointing != "full":
        ways.append('scale.activation_checkpointing = "full"')
    if "reference" not in cfg.scale.offload and not cfg.model.adapter.wanted:
        ways.append('scale.offload = ["reference"]')
    ways.append("a smaller micro_batch_tokens or rollout.batch_size")
    return "Ways out: " + ", ".join(ways) + "."
