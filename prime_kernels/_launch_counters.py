"""Counters of the programs of a launch that are done, so that the last one can finish the work."""

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def arrivals(device: torch.device) -> Tensor:
    """A counter [1] int32 that is 0 before and after every launch.

    Launches on one stream run one after another, so each stream has one counter. During CUDA graph capture a new one is
    made, as the graph may later run beside other work of its stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if (device, stream) not in _counters:
        _counters[device, stream] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[device, stream]
