"""Seeds of everything random in a run."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from (run seed, purpose, step, ..), the same on every machine and in every version of Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def shuffled(count: int, *parts: int | str) -> list[int]:
    """0 to count - 1 in an order that `derive_seed(*parts)` decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(*parts))).tolist()
