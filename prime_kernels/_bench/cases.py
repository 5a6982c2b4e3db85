"""The operations at one size each: inputs, ways to compute them, and the least work that any way has."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import prime_kernels as pk
from prime_kernels._bench import formulas, operations

# Leaves in, one result or several out.
Call = Callable[..., Tensor | tuple[Tensor, ...]]
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward and backward"
EAGER, COMPILE = "eager", "torch.compile"


class Sizes(NamedTuple):
    """What rows of logits and heads are made of, and packed tokens."""

    tokens: int
    vocabulary: int
    width: int
    packed: int


class Case(NamedTuple):
    """One operation at one size."""

    op: str
    size: str
    passes: tuple[str, ...]
    leaves: list[Tensor]
    """What ways take; those that want a gradient are differentiated."""
    ours: Call
    """The operation; takes ``backend=`` besides."""
    others: dict[str, Call]
    """Plain PyTorch, and installed packages."""
    traffic: dict[str, int]
    """Bytes that must move at least once, by pass."""
    flops: dict[str, int]
    """Floating-point operations that are needed at least, by pass: no logits are computed twice."""


def backends(device: torch.device) -> list[str]:
    """The backends with kernels that run tensors of this device without an interpreter."""
    names = ("cpu",) if device.type == "cpu" else ("triton", "cuda")
    return [name for name in names if pk.available_backends()[name] is None]


def cases(sizes: Sizes, device: torch.device, dtype: torch.dtype, ops: list[str]) -> Iterator[Case]:
    """One after another, so that only one case's inputs are in memory."""
    makers = {
        "candidates": _candidates,
        "log_probs": _log_probs,
        "log_ratios": _log_ratios,
        "linear_log_probs": _linear_log_probs,
        "linear_log_ratios": _linear_log_ratios,
        "linear_nll": _linear_nll,
        "linear_ppo_loss": _linear_ppo_loss,
    }
    for op in ops:
        torch.manual_seed(0)
        if op in makers:
            yield makers[op](sizes, device, dtype)
        else:
            yield _packed(op, sizes, device)


def bytes_needed(op: str, sizes: Sizes, device: torch.device) -> int:
    """About what the case takes: on a GPU at least, as it can say "out of memory"; on a CPU, which cannot, at most."""
    if op not in ("candidates", "log_probs", "log_ratios") and not op.startswith("linear"):
        return 200 * sizes.packed
    logits = sizes.tokens * sizes.vocabulary * (3 if op == "log_ratios" else 1)
    head = 16 * sizes.vocabulary * sizes.width
    if device.type == "cpu":
        return 24 * logits + head
    return (2 if op.startswith("linear") else 6) * logits + head


def _leaf(*shape: int, scale: float = 1.0, device: torch.device, dtype: torch.dtype) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def _ids(sizes: Sizes, device: torch.device) -> Tensor:
    return torch.randint(sizes.vocabulary, (sizes.tokens,), device=device)


def _ways(op: str, plain: Call, device: torch.device) -> dict[str, Call]:
    return {EAGER: plain, **formulas.peers(op, device.type)}


def _log_probs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    logits = _leaf(sizes.tokens, sizes.vocabulary, scale=3.0, device=device, dtype=dtype)
    return Case(
        "log_probs",
        f"{sizes.tokens} x {sizes.vocabulary}",
        (FORWARD, BACKWARD),
        [logits, _ids(sizes, device)],
        pk.log_probs,
        _ways("log_probs", formulas.log_probs, device),
        {FORWARD: logits.nbytes, BACKWARD: 2 * logits.nbytes},
        {},
    )


def _candidates(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    logits = _leaf(sizes.tokens, sizes.vocabulary, scale=3.0, device=device, dtype=dtype)
    return Case(
        "candidates",
        f"{sizes.tokens} x {sizes.vocabulary}",
        (FORWARD,),
        [logits, _ids(sizes, device)],
        operations.candidates,
        _ways("candidates", formulas.candidates, device),
        {FORWARD: logits.nbytes},
        {},
    )


def _log_ratios(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    models = [_leaf(sizes.tokens, sizes.vocabulary, scale=3.0, device=device, dtype=dtype) for _ in range(3)]
    return Case(
        "log_ratios",
        f"3 x {sizes.tokens} x {sizes.vocabulary}",
        (FORWARD,),
        [*models, _ids(sizes, device)],
        operations.log_ratios,
        _ways("log_ratios", formulas.log_ratios, device),
        {FORWARD: sum(z.nbytes for z in models)},
        {},
    )


def _head(sizes: Sizes, device: torch.device, dtype: torch.dtype, models: int = 1) -> tuple[list[Tensor], str, int]:
    """Hidden states of each model and a head, the size in words, and the operations of one product."""
    hidden = [_leaf(sizes.tokens, sizes.width, device=device, dtype=dtype) for _ in range(models)]
    weight = _leaf(sizes.vocabulary, sizes.width, scale=0.1, device=device, dtype=dtype)
    size = f"{sizes.tokens} x {sizes.width} x {sizes.vocabulary}"
    return [*hidden, weight], size, 2 * sizes.tokens * sizes.width * sizes.vocabulary


def _linear_log_probs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    leaves, size, flops = _head(sizes, device, dtype)
    ways = _ways("linear_log_probs", formulas.linear_log_probs, device)
    work = {FORWARD: flops, BACKWARD: 2 * flops}
    leaves.append(_ids(sizes, device))
    return Case("linear_log_probs", size, (FORWARD, BACKWARD), leaves, pk.linear_log_probs, ways, {}, work)


def _linear_log_ratios(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    leaves, size, flops = _head(sizes, device, dtype, models=3)
    ways = _ways("linear_log_ratios", formulas.linear_log_ratios, device)
    leaves.append(_ids(sizes, device))
    ours = operations.linear_log_ratios
    return Case("linear_log_ratios", f"3 x {size}", (FORWARD,), leaves, ours, ways, {}, {FORWARD: 3 * flops})


def _linear_nll(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    leaves, size, flops = _head(sizes, device, dtype)
    leaves.append(_ids(sizes, device))
    ways = _ways("linear_nll", formulas.linear_nll, device)
    return Case("linear_nll", size, (BOTH,), leaves, pk.linear_nll, ways, {}, {BOTH: 3 * flops})


def _linear_ppo_loss(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    leaves, size, flops = _head(sizes, device, dtype)
    leaves.append(_ids(sizes, device))
    with torch.no_grad():
        # In parts: what plain PyTorch holds of all logits need not fit.
        parts = zip(leaves[0].split(256), leaves[2].split(256), strict=True)
        old = torch.cat([formulas.linear_log_probs(hidden, leaves[1], ids) for hidden, ids in parts])
        old += 0.1 * torch.randn(sizes.tokens, device=device)
    leaves += [old, torch.randn(sizes.tokens, device=device)]
    ways = _ways("linear_ppo_loss", formulas.linear_ppo_loss, device)
    return Case("linear_ppo_loss", size, (BOTH,), leaves, operations.linear_ppo_loss, ways, {}, {BOTH: 3 * flops})


def _packed(op: str, sizes: Sizes, device: torch.device) -> Case:
    batch = operations.packed(sizes.packed, max(8, sizes.packed // 1024 // 4 * 4), device)
    cu, groups, total = batch.cu, batch.groups, batch.tokens
    longest, responses = batch.longest, batch.responses
    values, logp = batch.rewards.requires_grad_(), batch.logp.requires_grad_()
    columns = [logp, batch.old, batch.advantages]
    move = 4 * total
    if op == "pack":
        values = pk.unpack(values.detach(), cu, length=longest)
    if op == "distribution_ppo_loss":  # of four candidates a position
        columns = [each.detach()[: total // 4 * 4].view(-1, 4) for each in (logp, batch.old - 4.0, batch.advantages)]
        columns[0] = (columns[0] - 4.0).requires_grad_()
    scan, sums = (functools.partial(call, cu=cu) for call in (operations.segment_scan, operations.segment_sum))
    step_rewards = functools.partial(operations.step_rewards, steps=batch.steps, cu=cu)
    rloo = functools.partial(operations.rloo_advantages, cu=cu, groups=groups)
    prm = functools.partial(operations.prm_loss, cu=cu, groups=groups)
    table: dict[str, tuple[Call, list[Tensor], str, int]] = {
        "segment_scan": (scan, [values], FORWARD, 2 * move),
        "segment_sum": (sums, [values], FORWARD, move),
        "step_rewards": (step_rewards, [values], FORWARD, move),
        "rloo_advantages": (rloo, [values, batch.outcomes], FORWARD, 3 * move),
        "ppo_loss": (operations.ppo_loss, columns, BOTH, 4 * move),
        "distribution_ppo_loss": (operations.distribution_ppo_loss, columns, BOTH, 4 * move),
        "prm_loss": (prm, [values, batch.outcomes], BOTH, 2 * move),
        "pack": (functools.partial(operations.pack, cu=cu, total=total), [values], FORWARD, 2 * move),
        "unpack": (
            functools.partial(operations.unpack, cu=cu, length=longest),
            [values],
            FORWARD,
            move + 4 * longest * responses,
        ),
    }
    call, leaves, which, traffic = table[op]
    size = f"{total} tokens, {responses} responses"
    return Case(
        op, size, (which,), leaves, call, {EAGER: functools.partial(call, backend="eager")}, {which: traffic}, {}
    )
