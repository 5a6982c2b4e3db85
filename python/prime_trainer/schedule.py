"""Learning-rate schedules, as factors of the peak."""

from __future__ import annotations

import math


def cosine(step: int, total: int, warmup: float, floor: float = 0.0) -> float:
    """Linear warm-up over the share `warmup` of the `total` steps, then a cosine to `floor`; `step` counts from 1."""
    rise = max(1, round(total * warmup))
    if step <= rise:
        return step / rise
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise + 1)))
    return floor + (1 - floor) * fall
