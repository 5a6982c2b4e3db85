"""Counters that kernels share: how many programs of a launch are done, so that the last one can finish the work."""

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(device: torch.device) -> Tensor:
    """[1] int32, zero before and after every launch. Launches on one stream follow each other, so each stream has one.

    While a CUDA graph is captured a new one is made: the graph may later run beside others of its stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _counters:
        _counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[device, stream]
