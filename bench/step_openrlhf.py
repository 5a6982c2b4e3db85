"""One training step of OpenRLHF's actor and loss, for bench/step.py, without Ray, DeepSpeed and flash-attn.

Its trainer starts Ray workers whose optimizer is DeepSpeed's, and its modules import these and more; what is not
installed is stood in for by empty modules. The order of a step is its trainer's: log-probs of the policy as it is for
all passes, then forward and backward of each and the optimizer. AdamW with float32 masters is ours here.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch

from prime_trainer.data.groups import Group
from prime_trainer.train.trainable import Trainable

STOOD_IN = ("deepspeed", "peft", "flash_attn", "optimum", "pylatexenc", "ray", "torchdata", "einops", "jsonlines")


class StandIns:
    """Finds and loads modules that have every name."""

    def __init__(self) -> None:
        self.names = [name for name in STOOD_IN if importlib.util.find_spec(name) is None]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.names else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock(name=f"{spec.name}.{name}")  # type: ignore[method-assign]
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def by_openrlhf(model: Path, groups: list[Group], dtype: str, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds, loss and gradient norm of one optimizer step on all groups, a group a pass."""
    sys.meta_path.append(StandIns())  # type: ignore[arg-type]
    # Its Triton cross-entropy, which the stand-in would pretend to be.
    sys.modules["flash_attn.ops.triton.cross_entropy"] = None  # type: ignore[assignment]
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import PolicyLoss
    from transformers import AutoModelForCausalLM

    # Loaded here: by itself it loads 16-bit weights alone, and sets what follows.
    actor = Actor(AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), attn_implementation="sdpa"))
    actor.model.config.use_cache = actor.packing_samples = False
    actor.train()
    trainable = Trainable(actor.model, lr=1e-6, grad_clip=1.0)
    objective = PolicyLoss(token_level_loss=True)
    total = sum(len(response.ids) for group in groups for response in group.responses)

    def logp(group: Group, **options: Any) -> Any:
        ids = torch.tensor([group.prompt_ids + response.ids for response in group.responses])
        return actor(ids, mask(group), attention_mask=torch.ones_like(ids), **options)

    def mask(group: Group) -> torch.Tensor:
        return torch.ones(len(group.responses), len(group.responses[0].ids))

    begin = clock()
    with torch.no_grad():
        before = [logp(group) for group in groups]
    value = 0.0
    for group, old in zip(groups, before, strict=True):
        rewards = torch.tensor([response.outcome for response in group.responses])
        others = (rewards.sum() - rewards) / (len(rewards) - 1)
        advantages = (rewards - others)[:, None].expand(old.shape)
        found, _ = logp(group, return_output=True)
        loss = objective(found, old, advantages, action_mask=mask(group), batch_num_tokens=total)[0]
        loss.backward()
        value += loss.item()
    norm = trainable.step()
    return {"seconds": clock() - begin, "loss": value, "grad_norm": norm}
