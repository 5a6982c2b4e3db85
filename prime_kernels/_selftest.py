"""Every operation on every available backend against the eager reference: seconds, small tensors, no files."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import prime_kernels as pk

TOLERANCE = 1e-4
# Takes a backend and leaf tensors; the sum of its results is differentiated.
Call = Callable[..., tuple[Tensor, ...]]


class Outcome(NamedTuple):
    """The largest relative error of one operation on one backend, or why there is none."""

    op: str
    backend: str
    error: float | None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether results and gradients agree with the reference."""
        return self.failure is None


def run() -> Iterator[Outcome]:
    """One outcome for each operation on each available backend other than "eager"."""
    for backend, reason in pk.available_backends().items():
        if backend == "eager" or reason is not None:
            continue
        device = "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"
        generator = torch.Generator().manual_seed(0)
        for op, (call, leaves) in _cases(generator, device).items():
            yield _compare(op, backend, call, leaves)


def _compare(op: str, backend: str, call: Call, leaves: list[Tensor]) -> Outcome:
    try:
        got, want = (_results(call, each, leaves) for each in (backend, "eager"))
    except Exception as error:  # any error of a broken build or driver is reported
        return Outcome(op, backend, None, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    errors = [_relative_error(one, other) for one, other in zip(got, want, strict=True)]
    largest = max(errors)
    good = largest <= TOLERANCE  # False for NaN as well
    return Outcome(op, backend, largest, None if good else f"off by {largest:.1e}, more than {TOLERANCE:g}")


def _results(call: Call, backend: str, leaves: list[Tensor]) -> list[Tensor]:
    fresh = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    results = call(backend, *fresh)
    differentiable = [each for each in results if each.requires_grad]
    if differentiable:
        sum(each.float().square().sum() for each in differentiable).backward()  # type: ignore[union-attr]
    gradients = [leaf.grad for leaf in fresh if leaf.grad is not None]
    return [each.detach().float() for each in (*results, *gradients)]


def _relative_error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.abs().max().clamp(min=1.0)) if want.numel() else 0.0


def _cases(generator: torch.Generator, device: str) -> dict[str, tuple[Call, list[Tensor]]]:
    """For each operation, a call of it and the tensors it is differentiated in."""
    lengths, vocabulary, width = [5, 1, 9, 7], 1003, 48
    tokens = sum(lengths)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device)

    ids = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    mask = (torch.rand(tokens, generator=generator) < 0.8).to(device)
    cu = torch.tensor([0, *lengths], dtype=torch.int64, device=device).cumsum(0)
    steps = torch.tensor([0, 2, 5, 6, 10, 15, 18, 22], dtype=torch.int64, device=device)
    groups = torch.tensor([0, 2, 4], dtype=torch.int64, device=device)
    outcomes = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float32, device=device)
    values, old, advantages = normal(tokens), normal(tokens), normal(tokens)
    logits = [normal(tokens, vocabulary, scale=3.0) for _ in range(3)]
    hidden, weight = [normal(tokens, width) for _ in range(3)], normal(vocabulary, width, scale=0.3)

    def log_probs(backend: str, z: Tensor) -> tuple[Tensor, ...]:
        return tuple(pk.log_probs(z, ids, mask=mask, temperature=0.7, with_entropy=True, backend=backend))

    def log_ratios(backend: str, prm: Tensor, ref: Tensor, policy: Tensor) -> tuple[Tensor, ...]:
        return _tensors(pk.log_ratios(prm, ref, ids, policy_logits=policy, mask=mask, backend=backend))

    def linear_log_probs(backend: str, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(pk.linear_log_probs(h, w, ids, mask=mask, with_entropy=True, backend=backend))

    def linear_log_ratios(backend: str, prm: Tensor, ref: Tensor, policy: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        heads = [pk.Head(h, w) for h in (prm, ref, policy)]
        return _tensors(pk.linear_log_ratios(heads[0], heads[1], ids, policy=heads[2], backend=backend))

    def linear_ppo_loss(backend: str, h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return _tensors(pk.linear_ppo_loss(h, w, ids, old - 6.0, advantages, mask=mask, backend=backend))

    def unpack(backend: str, x: Tensor) -> tuple[Tensor, ...]:
        return (pk.unpack(x, cu, length=11, padding="left", fill=2.0, backend=backend),)

    def rloo_advantages(backend: str) -> tuple[Tensor, ...]:
        return tuple(pk.rloo_advantages(values, outcomes, cu, groups, gamma_process=0.9, backend=backend))

    def candidates(backend: str) -> tuple[Tensor, ...]:
        found = pk.candidates(pk.Head(hidden[0], weight), ids, min_prob=0.05, mask=mask, backend=backend)
        of_logits = pk.candidates(logits[0], min_prob=0.05, mask=mask, backend=backend)
        return _tensors((found.logp.exp(), found.counts, found.token_logp, of_logits.ids))

    def distribution_ppo_loss(backend: str, z: Tensor) -> tuple[Tensor, ...]:
        few = ids.unsqueeze(-1) // torch.arange(1, 4, device=device)
        columns = (old.unsqueeze(-1).expand(-1, 3) - 6.0, advantages.unsqueeze(-1).expand(-1, 3))
        logp = pk.log_probs(z, few, mask=mask, backend=backend)
        return _tensors(pk.distribution_ppo_loss(logp, *columns, mask=mask, backend=backend))

    return {
        "candidates": (candidates, []),
        "distribution_ppo_loss": (distribution_ppo_loss, logits[:1]),
        "log_probs": (log_probs, logits[:1]),
        "log_ratios": (log_ratios, logits),
        "linear_log_probs": (linear_log_probs, [hidden[0], weight]),
        "linear_log_ratios": (linear_log_ratios, [*hidden, weight]),
        "linear_nll": (lambda b, h, w: (pk.linear_nll(h, w, ids, mask=mask, backend=b),), [hidden[0], weight]),
        "linear_ppo_loss": (linear_ppo_loss, [hidden[0], weight]),
        "segment_scan": (lambda b, x: (pk.segment_scan(x, cu, gamma=0.9, reverse=True, backend=b),), [values]),
        "segment_sum": (lambda b, x: (pk.segment_sum(x, cu, backend=b),), [values]),
        "step_rewards": (lambda b, x: (pk.step_rewards(x, steps, cu, mode="cumulative", backend=b),), [values]),
        "rloo_advantages": (rloo_advantages, []),
        "pack": (lambda b, x: (pk.pack(x, cu, total=tokens, backend=b),), [normal(len(lengths), 11)]),
        "unpack": (unpack, [values]),
        "ppo_loss": (lambda b, x: _tensors(pk.ppo_loss(x, old, advantages, mask=mask, backend=b)), [values]),
        "prm_loss": (lambda b, x: _tensors(pk.prm_loss(x, outcomes, cu, cu_groups=groups, backend=b)), [values]),
    }


def _tensors(results: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(each for each in results if each is not None)
