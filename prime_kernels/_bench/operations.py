"""What is timed: the operations as functions of their leaves and a backend, and a batch of packed responses.

`python -m prime_kernels bench` and `make bench` time these, each at its own sizes.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

import prime_kernels as pk

GROUP, STEPS = 4, 20
GAMMA = 0.95


class Packed(NamedTuple):
    """Responses of very different lengths in groups of four, each of about twenty steps."""

    cu: Tensor
    groups: Tensor
    steps: Tensor
    rewards: Tensor
    outcomes: Tensor
    logp: Tensor
    old: Tensor
    advantages: Tensor

    @property
    def tokens(self) -> int:
        return self.rewards.numel()

    @property
    def responses(self) -> int:
        return self.outcomes.numel()

    @property
    def longest(self) -> int:
        return int(self.cu.diff().max())


def packed(total: int, responses: int, device: torch.device) -> Packed:
    """About ``total`` tokens; lengths are log-uniform over a factor of 256. The same numbers in every run."""
    generator = torch.Generator().manual_seed(0)
    lengths = 16.0 * 256.0 ** torch.rand(responses, generator=generator)
    lengths = (lengths * (total / lengths.sum())).round().long().clamp(min=1)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    ends = cu.tolist()
    cuts = [torch.linspace(a, b, STEPS + 1)[:-1].long() for a, b in itertools.pairwise(ends)]

    def column() -> Tensor:
        return torch.randn(ends[-1], generator=generator).to(device)

    old = column() - 2.0
    return Packed(
        cu.to(device),
        torch.arange(0, responses + 1, GROUP).to(device),
        torch.cat([*cuts, cu[-1:]]).to(device),
        0.05 * column(),
        torch.randint(2, (responses,), generator=generator).float().to(device),
        old + 0.1 * column(),
        old,
        column(),
    )


def segment_scan(values: Tensor, cu: Tensor, backend: str | None = None) -> Tensor:
    return pk.segment_scan(values, cu, gamma=GAMMA, reverse=True, backend=backend)


def segment_sum(values: Tensor, cu: Tensor, backend: str | None = None) -> Tensor:
    return pk.segment_sum(values, cu, backend=backend)


def step_rewards(values: Tensor, steps: Tensor, cu: Tensor, backend: str | None = None) -> Tensor:
    return pk.step_rewards(values, steps, cu, backend=backend)


def rloo_advantages(
    rewards: Tensor, outcomes: Tensor, cu: Tensor, groups: Tensor, gamma: float = GAMMA, backend: str | None = None
) -> tuple[Tensor, ...]:
    columns = rewards.detach(), outcomes, cu, groups
    return tuple(pk.rloo_advantages(*columns, gamma_process=gamma, gamma_outcome=gamma, backend=backend))


def ppo_loss(logp: Tensor, old: Tensor, advantages: Tensor, backend: str | None = None) -> Tensor:
    return pk.ppo_loss(logp, old, advantages, backend=backend).loss


def distribution_ppo_loss(logp: Tensor, old: Tensor, advantages: Tensor, backend: str | None = None) -> Tensor:
    return pk.distribution_ppo_loss(logp, old, advantages, backend=backend).loss


def prm_loss(
    ratio: Tensor, outcomes: Tensor, cu: Tensor, groups: Tensor, kind: str = "ce", backend: str | None = None
) -> Tensor:
    return pk.prm_loss(ratio, outcomes, cu, cu_groups=groups, kind=kind, backend=backend).loss


def pack(padded: Tensor, cu: Tensor, total: int, backend: str | None = None) -> Tensor:
    return pk.pack(padded, cu, total=total, backend=backend)


def unpack(values: Tensor, cu: Tensor, length: int, backend: str | None = None) -> Tensor:
    return pk.unpack(values, cu, length=length, backend=backend)


def log_ratios(prm: Tensor, ref: Tensor, policy: Tensor, ids: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    return tensors(pk.log_ratios(prm, ref, ids, policy_logits=policy, backend=backend))


def candidates(logits: Tensor, ids: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
    found = pk.candidates(logits, ids, min_prob=0.1, backend=backend)
    return tensors((found.token_logp, found.logp.exp()))


def linear_log_ratios(
    prm: Tensor, ref: Tensor, policy: Tensor, weight: Tensor, ids: Tensor, backend: str | None = None
) -> tuple[Tensor, ...]:
    heads = [pk.Head(hidden, weight) for hidden in (prm, ref, policy)]
    return tensors(pk.linear_log_ratios(heads[0], heads[1], ids, policy=heads[2], backend=backend))


def linear_ppo_loss(*columns: Tensor, backend: str | None = None) -> Tensor:
    return pk.linear_ppo_loss(*columns, backend=backend).loss


def tensors(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(each for each in results if each is not None)
