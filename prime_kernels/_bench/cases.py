"""The operations at one size each: inputs, ways to compute them, and the least work that any way has."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import prime_kernels as pk
from prime_kernels._bench import formulas

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

    def ours(logits: Tensor, ids: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        found = pk.candidates(logits, ids, backend=backend)
        return _tensors((found.token_logp, found.logp.exp()))

    return Case(
        "candidates",
        f"{sizes.tokens} x {sizes.vocabulary}",
        (FORWARD,),
        [logits, _ids(sizes, device)],
        ours,
        _ways("candidates", formulas.candidates, device),
        {FORWARD: logits.nbytes},
        {},
    )


def _log_ratios(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Case:
    models = [_leaf(sizes.tokens, sizes.vocabulary, scale=3.0, device=device, dtype=dtype) for _ in range(3)]

    def ours(prm: Tensor, ref: Tensor, policy: Tensor, ids: Tensor, backend: str | None = None) -> tuple[Tensor, ...]:
        return _tensors(pk.log_ratios(prm, ref, ids, policy_logits=policy, backend=backend))

    return Case(
        "log_ratios",
        f"3 x {sizes.tokens} x {sizes.vocabulary}",
        (FORWARD,),
        [*models, _ids(sizes, device)],
        ours,
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

    def ours(
        prm: Tensor, ref: Tensor, policy: Tensor, weight: Tensor, ids: Tensor, backend: str | None = None
    ) -> tuple[Tensor, ...]:
        heads = [pk.Head(hidden, weight) for hidden in (prm, ref, policy)]
        return _tensors(pk.linear_log_ratios(heads[0], heads[1], ids, policy=heads[2], backend=backend))

    ways = _ways("linear_log_ratios", formulas.linear_log_ratios, device)
    leaves.append(_ids(sizes, device))
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

    def ours(*columns: Tensor, backend: str | None = None) -> Tensor:
        return pk.linear_ppo_loss(*columns, backend=backend).loss

    ways = _ways("linear_ppo_loss", formulas.linear_ppo_loss, device)
    return Case("linear_ppo_loss", size, (BOTH,), leaves, ours, ways, {}, {BOTH: 3 * flops})


def _tensors(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(each for each in results if each is not None)


def lengths_of(total: int) -> Tensor:
    """Lengths of responses in groups of four, log-uniform over a factor of 256, about ``total`` tokens in all."""
    responses = max(8, total // 1024 // 4 * 4)
    lengths = 16.0 * 256.0 ** torch.rand(responses, generator=torch.Generator().manual_seed(0))
    return (lengths * (total / lengths.sum())).round().long().clamp(min=1)


def _packed(op: str, sizes: Sizes, device: torch.device) -> Case:
    lengths = lengths_of(sizes.packed)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    tokens, responses, longest = int(cu[-1]), len(lengths), int(lengths.max())
    cuts = [torch.linspace(int(a), int(b), 21)[:-1].long() for a, b in zip(cu.tolist(), cu[1:].tolist(), strict=False)]
    steps = torch.cat([*cuts, cu[-1:]]).to(device)
    groups = torch.arange(0, responses + 1, 4).to(device)
    cu = cu.to(device)
    column = functools.partial(torch.randn, tokens, device=device)
    logp = column().requires_grad_()
    outcomes = torch.randint(2, (responses,), device=device).float()
    old, advantages = logp.detach() + 0.1 * column(), column()
    move = 4 * tokens

    def rloo(rewards: Tensor, outcomes: Tensor, backend: str | None) -> tuple[Tensor, ...]:
        return tuple(pk.rloo_advantages(rewards.detach(), outcomes, cu, groups, gamma_process=0.95, backend=backend))

    def prm(ratio: Tensor, outcomes: Tensor, backend: str | None) -> Tensor:
        return pk.prm_loss(ratio, outcomes, cu, cu_groups=groups, backend=backend).loss

    def ppo(logp: Tensor, old: Tensor, advantages: Tensor, backend: str | None) -> Tensor:
        return pk.ppo_loss(logp, old, advantages, backend=backend).loss

    def distribution(logp: Tensor, old: Tensor, advantages: Tensor, backend: str | None) -> Tensor:
        # Of four candidates a position.
        columns = (each[: len(each) // 4 * 4].view(-1, 4) for each in (logp, old - 4.0, advantages))
        return pk.distribution_ppo_loss(*columns, backend=backend).loss

    def scan(values: Tensor, backend: str | None) -> Tensor:
        return pk.segment_scan(values, cu, gamma=0.95, reverse=True, backend=backend)

    def pack(padded: Tensor, backend: str | None) -> Tensor:
        return pk.pack(padded, cu, total=tokens, backend=backend)

    def unpack(values: Tensor, backend: str | None) -> Tensor:
        return pk.unpack(values, cu, length=longest, backend=backend)

    padded = pk.unpack(logp.detach(), cu, length=longest) if op == "pack" else logp
    table: dict[str, tuple[Call, list[Tensor], str, int]] = {
        "segment_scan": (scan, [logp], FORWARD, 2 * move),
        "segment_sum": (lambda x, backend: pk.segment_sum(x, cu, backend=backend), [logp], FORWARD, move),
        "step_rewards": (lambda x, backend: pk.step_rewards(x, steps, cu, backend=backend), [logp], FORWARD, move),
        "rloo_advantages": (rloo, [logp, outcomes], FORWARD, 3 * move),
        "ppo_loss": (ppo, [logp, old, advantages], BOTH, 4 * move),
        "distribution_ppo_loss": (distribution, [logp, old, advantages], BOTH, 4 * move),
        "prm_loss": (prm, [logp, outcomes], BOTH, 2 * move),
        "pack": (pack, [padded], FORWARD, 2 * move),
        "unpack": (unpack, [logp], FORWARD, move + 4 * longest * responses),
    }
    call, leaves, which, traffic = table[op]
    size = f"{tokens} tokens, {responses} responses"
    return Case(
        op, size, (which,), leaves, call, {EAGER: functools.partial(call, backend="eager")}, {which: traffic}, {}
    )
