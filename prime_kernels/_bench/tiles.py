"""Sizes of tiles of logits, tried on the linear operations."""

import sys
import time

import torch

import prime_kernels as pk
from prime_kernels import _tuning
from prime_kernels._bench import timing
from prime_kernels._bench.cases import Sizes, backends
from prime_kernels.ops import _tiled_head

FACTORS = (1, 2, 4, 8, 16)
# A size must be this much faster than the one in use to take its place.
GAIN = 1.02


def best(device: torch.device, dtype: torch.dtype, sizes: Sizes, seconds: float) -> dict[str, int]:
    """The fastest size of each kind of tile among some larger and smaller ones, for those that there is time for.

    Only what differs from the built-in size is named.
    """
    name, deadline = device.type, time.perf_counter() + seconds
    if backends(device)[0] in _tiled_head.HEAD_KERNELS:
        return {}  # its kernels for whole heads have blocks of their own
    with _tuning.trial(_tuning.none(name)):  # not those of a file in use: the new one replaces it
        used = {
            "fused_columns": 0,  # a library's products
            "forward_elements": _tiled_head.forward_elements(name),
            "kept_bytes": _tiled_head.kept_bytes(name),
            "fused_bytes": _tiled_head.fused_bytes(name),
        }
    tokens = min(sizes.tokens, 8192)
    memory = 0.5 * timing.free_bytes(device)
    if (16 * sizes.vocabulary + 4 * tokens) * sizes.width > memory:
        return {}
    hidden = torch.randn(tokens, sizes.width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(sizes.vocabulary, sizes.width, device=device) * 0.1).to(dtype).requires_grad_()
    ids = torch.randint(sizes.vocabulary, (tokens,), device=device)

    def forward() -> object:
        with torch.no_grad():
            return pk.linear_log_probs(hidden, weight, ids)

    def both_ways() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(pk.linear_log_probs(hidden, weight, ids).sum(), [hidden, weight])

    def each() -> object:
        return forward(), *both_ways()

    def fused() -> object:
        return torch.autograd.grad(pk.linear_nll(hidden, weight, ids), [hidden, weight])

    found = {}
    whole = tokens * sizes.vocabulary
    all_bytes = whole * torch.float32.itemsize
    # Keeping all of these logits and keeping none: whichever is not in use.
    other = 1 if all_bytes <= used["kept_bytes"] else all_bytes
    for kind, call, candidates in (
        ("kept_bytes", both_ways, [used["kept_bytes"], other]),
        ("fused_columns", each, [0, *_tuning.FUSED_COLUMNS] if backends(device)[0] == "triton" else []),
        ("forward_elements", forward, _candidates(used["forward_elements"], whole, memory)),
        ("fused_bytes", fused, _candidates(used["fused_bytes"], all_bytes, memory)),
    ):
        times: dict[int, float] = {}
        want: object = None
        for size in candidates:
            longest = max(times.values(), default=0.0)
            if time.perf_counter() + 3 * longest > deadline:
                break
            chosen = dict.fromkeys(("linear_log_probs", "linear_nll"), backends(device)[0])
            with _tuning.trial(_tuning.Tuning(name, "", {}, chosen, {kind: size})):
                try:
                    got = call()
                    want = got if want is None else want
                    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-3)
                    times[size] = timing.timed(call, device, max(0.05, (deadline - time.perf_counter()) / 12)).median
                except Exception as error:  # whatever a kernel of another size fails with, it is not chosen
                    print(f"{kind} {size}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    break
        fastest = min(times, key=lambda size: times[size], default=None)
        if fastest is not None and times.get(used[kind], 0.0) > GAIN * times[fastest]:
            found[kind] = fastest
    return found


def _candidates(used: int, most: int, memory: float) -> list[int]:
    """The size in use, smaller and larger ones; beyond ``most``, which is all logits, there is no difference."""
    larger = [used * factor for factor in FACTORS[1:] if used * factor // 2 < most and 4 * used * factor < memory]
    return [used, used // 2, used // 4, *larger]
