"""Memory and traffic of a run before it starts: counted on a model without data (meta device), not guessed from names.

Sizes are of one GPU with everything in shards over all of them. Activations are what autograd keeps of one forward
pass of the configured model; attention is taken to keep its inputs and output, as flash and efficient kernels do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import models, sharding
from .config import RunConfig

GIB = 2**30
MASTER_BYTES, ADAM_BYTES, GRAD_BYTES = 4, 8, 4
LOGITS_TILE = 64 * 2**20
"""Float32 logits alive at once in the linear losses."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model in elements; a `layer` is the largest one."""

    parameters: int
    layer: int
    outside: int
    """Parameters of the embedding and what else is in no layer, the head left out where it is tied."""
    head: int
    layers: int
    width: int
    cache_per_token: int
    """Keys and values of all layers."""


@dataclass(frozen=True)
class Plan:
    """Bytes by stage on one GPU, bytes sent by one GPU in a step, by what for."""

    shape: Shape
    memory: dict[str, dict[str, float]]
    traffic: dict[str, float]
    passes: int
    """Forward passes of one rank over its share of a step."""
    row: int
    """Tokens of one pass."""


def shape_of(model: Any) -> Shape:
    """Counts a model's parameters; those that modules share count once."""
    found = sharding.layers(model)
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in found]
    total, head = sum(p.numel() for p in model.parameters()), model.get_output_embeddings().weight.numel()
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        total, max(sizes), total - sum(sizes), head, len(found), config.hidden_size,
        2 * len(found) * size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads),
    )  # fmt: skip


def activation_bytes(model: Any, tokens: int) -> tuple[int, int]:
    """(bytes that autograd keeps of one layer for `tokens` tokens, of its input alone), from a pass on `meta`."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in parameters and key not in kept:
            kept[key] = storage.nbytes()
            storages.append(storage)  # kept alive, so that no other storage takes its address
        return tensor

    ids = torch.zeros((1, tokens), dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = models.hidden_states(model, ids, ids, None)
    total, found = sum(kept.values()), len(sharding.layers(model))
    del hidden
    one = tokens * model.config.hidden_size * next(model.parameters()).element_size()
    return total // found, one


def make(cfg: RunConfig, gpus: int, prompt_tokens: int) -> Plan:
    """The plan of `cfg` on `gpus` GPUs for prompts of `prompt_tokens` and responses of `rollout.max_new_tokens`."""
    model = models.meta_model(cfg.model)
    shape, compute = shape_of(model), torch.empty(0, dtype=getattr(torch, cfg.model.dtype)).element_size()
    offload, dense = set(cfg.scale.offload), cfg.algorithm.process_coef > 0
    ranks = gpus if cfg.scale.shard else 1
    length = prompt_tokens + cfg.rollout.max_new_tokens
    row = max(length, cfg.micro_batch_tokens // length * length)
    responses = cfg.rollout.prompts_per_step * cfg.rollout.n
    passes = math.ceil(responses * length / gpus / row)
    per_layer, entry = activation_bytes(model, row)
    kept = (entry * shape.layers + per_layer) if cfg.scale.activation_checkpointing else per_layer * shape.layers

    trained = (MASTER_BYTES + ADAM_BYTES) * shape.parameters / ranks
    if ranks == 1:
        trained += compute * shape.parameters  # a whole copy in the compute dtype beside its masters
    has_ref = cfg.policy.kl_coef > 0 or (dense and cfg.prm.ref_type == "freeze")
    held = {
        "policy, masters and AdamW": 0.0 if "policy" in offload else trained,
        "PRM, masters and AdamW": trained if dense and "prm" not in offload else 0.0,
        "reference": compute * shape.parameters / ranks if has_ref and "reference" not in offload else 0.0,
    }
    # What is gathered at a time: the part outside the layers, a layer at work and the next, and the head.
    gathered = compute * (shape.outside + 2 * shape.layer + shape.head) if ranks > 1 else 0.0
    gradient = GRAD_BYTES * shape.parameters / ranks
    backward = {
        "gathered parameters": gathered,
        "activations": float(kept),
        "gradients": gradient,
        "gradients on their way": (compute + GRAD_BYTES) * shape.layer + GRAD_BYTES * shape.head if ranks > 1 else 0.0,
        "logits": float(LOGITS_TILE),
    }
    side_by_side = min(cfg.rollout.batch_size, math.ceil(responses / gpus))
    memory = {
        "rollout": held
        | {
            "whole policy": compute * shape.parameters if ranks > 1 else 0.0,
            "keys and values": float(compute * shape.cache_per_token * side_by_side * length),
        }
        if cfg.rollout.engine == "transformers"
        else held,
    }
    if dense and cfg.prm.update != "none":
        memory["score and PRM update"] = held | backward
    else:
        memory["score"] = held | {"gathered parameters": gathered, "logits": float(LOGITS_TILE)}
    memory["policy update"] = held | backward

    sent = (ranks - 1) / ranks
    gather, reduce = compute * shape.parameters * sent, GRAD_BYTES * shape.parameters * sent
    scoring = int(has_ref) + int(cfg.policy.epochs * cfg.policy.minibatches > 1 or cfg.prm.ref_type == "policy")
    rounds = passes * cfg.policy.epochs
    traffic = {
        "rollout: the policy gathered once": gather if ranks > 1 else 0.0,
        "score: forward passes of policy and reference": passes * scoring * gather,
        "PRM: forward, backward, gradients": passes * (2 * gather + reduce) if dense else 0.0,
        "policy: forward, backward, gradients": rounds * (2 * gather + reduce),
    }
    if ranks == 1 and gpus > 1:  # whole copies add their gradients up once an optimizer step
        ring = 2 * (gpus - 1) / gpus * GRAD_BYTES * shape.parameters
        steps = cfg.policy.epochs * cfg.policy.minibatches
        traffic |= {"PRM: forward, backward, gradients": ring * cfg.prm.minibatches if dense else 0.0}
        traffic |= {"policy: forward, backward, gradients": ring * steps}
    return Plan(shape, memory, traffic, passes, row)


def render(plan: Plan, cfg: RunConfig, gpus: int, memory_gib: float) -> str:
    """The plan as Markdown."""
    lines = [
        f"{cfg.model.path}: {plan.shape.parameters / 1e9:.2f} billion parameters on {gpus} x {memory_gib:g} GiB, "
        f"{plan.passes} passes of {plan.row} tokens a rank and step",
        "",
        "| GiB on one GPU | " + " | ".join(plan.memory) + " |",
        "|---|" + "--:|" * len(plan.memory),
    ]
    rows = dict.fromkeys(name for parts in plan.memory.values() for name in parts)
    for name in rows:
        values = [parts.get(name, 0.0) for parts in plan.memory.values()]
        if any(values):
            lines.append(f"| {name} | " + " | ".join(f"{v / GIB:.1f}" if v else "" for v in values) + " |")
    totals = [sum(parts.values()) / GIB for parts in plan.memory.values()]
    lines.append("| **sum** | " + " | ".join(f"**{total:.1f}**" for total in totals) + " |")
    worst = max(totals)
    if worst <= 0.9 * memory_gib:
        lines += ["", f"It fits: {worst:.1f} GiB at most, a tenth of {memory_gib:g} GiB left to the allocator."]
    else:
        lines += ["", f"It does not fit: {worst:.1f} GiB where 90 % of {memory_gib:g} GiB is to be had. {_advice(cfg)}"]
    lines += ["", "| GiB sent by one GPU in a step | |", "|---|--:|"]
    lines += [f"| {name} | {value / GIB:.1f} |" for name, value in plan.traffic.items() if value]
    return "\n".join(lines)


def _advice(cfg: RunConfig) -> str:
    ways = ["more GPUs"]
    if not cfg.scale.shard:
        ways.append("scale.shard = true")
    if not cfg.scale.activation_checkpointing:
        ways.append("scale.activation_checkpointing = true")
    if "reference" not in cfg.scale.offload:
        ways.append('scale.offload = ["reference"]')
    ways.append("a smaller micro_batch_tokens or rollout.batch_size")
    return "Ways out: " + ", ".join(ways) + "."
