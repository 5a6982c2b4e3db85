"""A model that trains: float32 master weights, AdamW, clipping and the sum of gradients over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..models.protocols import CausalLM
from ..scale.ranks import SINGLE, Ranks


class Trainable:
    """A model with float32 master weights: bf16 weights would round away updates of the usual learning rates.

    Gradients are summed in float32 as each backward pass ends, so that micro-batching does not cost precision. A model
    in shards (`sharding.shard`) is its own master; whole copies on several ranks add their gradients up in `step`.
    """

    def __init__(
        self,
        model: CausalLM,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        grad_clip: float,
        ranks: Ranks = SINGLE,
    ) -> None:
        self.model, self.lr, self.grad_clip, self.ranks = model, lr, grad_clip, ranks
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.sharded = ranks.mesh is not None
        self.master: list[Tensor] = (
            list(self.params) if self.sharded else [p.detach().float().clone() for p in self.params]
        )
        self.optimizer = torch.optim.AdamW(self.master, lr=lr, betas=betas, weight_decay=0.0, fused=True)
        # AdamW would make these with its first step; a checkpoint is read into them before.
        for master in self.master:
            self.optimizer.state[master] = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        self._skipped, self.updates = 0, 0
        if not self.sharded:
            for param, master in zip(self.params, self.master, strict=True):
                param.register_post_accumulate_grad_hook(_adder(master))

    def step(self, lr_scale: float = 1.0) -> float:
        """One clipped optimizer step; returns the gradient norm before clipping. A non-finite norm skips the step."""
        if not self.sharded:
            for master in self.master:
                if master.grad is not None:
                    self.ranks.sum_(master.grad)
        total = torch.nn.utils.clip_grad_norm_(self.master, self.grad_clip, foreach=True)
        norm = float((total.full_tensor() if isinstance(total, DTensor) else total).item())
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * lr_scale
            self.updates += 1
            self.optimizer.step()
            self.publish()
        else:
            self._skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def taken_skips(self) -> int:
        """Steps skipped since this was last asked."""
        skipped, self._skipped = self._skipped, 0
        return skipped

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the master weights into the compute weights."""
        if not self.sharded:
            torch._foreach_copy_([p.data for p in self.params], list(self.master))

    def state_dict(self) -> dict[str, Any]:
        return {"master": self.master, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.master, state["master"], strict=True):
            mine.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.publish()


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    def add(param: Tensor) -> None:
        assert param.grad is not None  # called when it has just been accumulated
        if master.grad is None:
            master.grad = param.grad.float()
        else:
            master.grad.add_(param.grad)
        param.grad = None

    return add
