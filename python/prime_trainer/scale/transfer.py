"""Between host and device: copies up that nobody waits for, and the one way back that waits.

A step is laid out on the host before its first pass, so that a GPU always has work queued. What comes back, numbers for
people and for decisions, is fetched in as few copies as there are decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Values = dict[str, float | Tensor]
"""Metrics of a step: numbers, or scalars that are still on the device."""


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; a GPU copies it from pinned memory, in the order of its other work."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def upload_together(host: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tensors of one dtype in one copy: views of one tensor on `device`."""
    there = upload(torch.cat([each.flatten() for each in host]), device)
    parts = there.split([each.numel() for each in host])
    return [part.view(each.shape) for part, each in zip(parts, host, strict=True)]


def fetched(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """All as numbers, in one copy, which waits for what computes them."""
    scalars = [value.detach().double() for value in values.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(scalars).tolist() if scalars else ())
    return {key: next(numbers) if isinstance(value, Tensor) else value for key, value in values.items()}
