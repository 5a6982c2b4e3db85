"""Operations of output layers against the bare products that they contain, and gradients of logits against a copy.

    python bench/products.py [--rounds 9] > table.md

One thread, all ways in turn in each round, in processor time: other work on the machine then counts little, and what is
compared has met the same. Shares are of medians and of the fastest rounds. Errors are the worst against float64 of the
same inputs: log-probs in nats, gradients relative to the largest element.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from measure import SMALL, compiled, leaf
from torch import Tensor

import prime_kernels as pk
from prime_kernels._bench import formulas
from prime_trainer.report import markdown
from prime_trainer.run.provenance import environment

TOKENS, WIDTH, VOCABULARY = (8, 16, 256) if SMALL else (1024, 576, 49152)
# Seconds beyond which a way is timed once.
LONG = 2.0
FORWARD, BOTH, LOGITS = "forward", "forward and backward", "log_probs of logits, forward and backward"
FROZEN = "forward and backward, frozen head"


class Way(NamedTuple):
    """One row of the table."""

    group: str
    name: str
    call: Callable[[], Sequence[Tensor]]
    work: float
    """Of the group's first way: products, or bytes moved relative to a copy's."""
    error: str = ""


class Inputs:
    """Of all ways; of logits the fewer digits that an output layer in bfloat16 has."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.hidden, self.weight = leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH, scale=0.1)
        self.ids = torch.randint(VOCABULARY, (TOKENS,))
        self.upstream, self.advantages = torch.randn(TOKENS), torch.randn(TOKENS)
        self.logits = leaf(TOKENS, VOCABULARY, scale=3.0)
        with torch.no_grad():
            self.old = pk.linear_log_probs(self.hidden, self.weight, self.ids) + 0.1 * torch.randn(TOKENS)


def products(of: Inputs) -> list[Way]:
    """Into buffers that are there already."""
    hidden, weight = of.hidden.detach(), of.weight.detach()
    buffer = hidden.new_empty(TOKENS, VOCABULARY)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def one() -> Sequence[Tensor]:
        return (torch.mm(hidden, weight.T, out=buffer),)

    def three() -> Sequence[Tensor]:
        one()
        return torch.mm(buffer, weight, out=grad_hidden), torch.mm(buffer.T, hidden, out=grad_weight)

    def two() -> Sequence[Tensor]:
        one()
        return (torch.mm(buffer, weight, out=grad_hidden),)

    return [
        Way(FORWARD, "the product alone", one, 1.0),
        Way(BOTH, "three products alone", three, 3.0),
        Way(FROZEN, "two products alone", two, 2.0),
    ]


def forwards(of: Inputs) -> list[Way]:
    hidden, weight = of.hidden.detach(), of.weight.detach()
    exact = (hidden[:512].double() @ weight.double().T).log_softmax(-1).gather(-1, of.ids[:512, None]).squeeze(-1)
    heads = [pk.Head(each, weight) for each in (hidden, hidden.flip(0), hidden.roll(1, 0))]
    ways: dict[str, Callable[..., Tensor]] = {
        "linear_log_probs": pk.linear_log_probs,
        "eager PyTorch": formulas.linear_log_probs,
        "torch.compile": compiled(formulas.linear_log_probs),
    }
    rows = []
    for name, function in ways.items():
        worst = (function(hidden, weight, of.ids)[:512].double() - exact).abs().max().item()
        rows.append(Way(FORWARD, name, lambda f=function: (f(hidden, weight, of.ids),), 1.0, f"{worst:.1e}"))

    def ratios() -> Sequence[Tensor]:
        return (pk.linear_log_ratios(*heads[:2], of.ids, policy=heads[2]).log_ratio,)

    return [*rows, Way(FORWARD, "linear_log_ratios of three models", ratios, 3.0)]


def losses(of: Inputs) -> list[Way]:
    leaves = (of.hidden, of.weight)

    def ppo(*given: Tensor, backend: str | None = None) -> Tensor:
        return pk.linear_ppo_loss(*given, backend=backend).loss

    columns = (*leaves, of.ids)
    ppo_columns = (*columns, of.old, of.advantages)
    # What is called, its arguments, the gradient of its result, and which of ours it computes.
    ways: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], Tensor | None, Callable[..., Tensor]]] = {
        "linear_log_probs": (pk.linear_log_probs, columns, of.upstream, pk.linear_log_probs),
        "linear_nll": (pk.linear_nll, columns, None, pk.linear_nll),
        "linear_ppo_loss": (ppo, ppo_columns, None, ppo),
        "eager PyTorch: nll": (formulas.linear_nll, columns, None, pk.linear_nll),
        "torch.compile: nll": (compiled(formulas.linear_nll), columns, None, pk.linear_nll),
        "torch.compile: ppo": (compiled(formulas.linear_ppo_loss), ppo_columns, None, ppo),
    }
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        peer = torch.nn.functional.linear_cross_entropy
        ways["F.linear_cross_entropy"] = (peer, columns, None, pk.linear_nll)
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            chunks = functools.partial(peer, options=torch.nn.LinearCrossEntropyOptions())
            ways["F.linear_cross_entropy, options"] = (chunks, columns, None, pk.linear_nll)
    exact = tuple(each.detach().double().requires_grad_() for each in leaves)
    truth: dict[Callable[..., Tensor], Sequence[Tensor]] = {}
    rows = []
    for name, (function, given, upstream, ours) in ways.items():

        def call(f=function, given=given, upstream=upstream) -> Sequence[Tensor]:
            return torch.autograd.grad(f(*given), leaves, upstream)

        if ours not in truth:
            double = None if upstream is None else upstream.double()
            truth[ours] = torch.autograd.grad(ours(*exact, *given[2:], backend="eager"), exact, double)
        rows.append(Way(BOTH, name, call, 3.0, worst_of(call(), truth[ours])))
    return rows


def frozen(of: Inputs) -> list[Way]:
    """Of a head that takes no gradient, as under adapters: the logits and the gradient of the hidden states."""
    exact, head = of.hidden.detach().double().requires_grad_(), of.weight.detach()

    def ppo(*given: Tensor, backend: str | None = None) -> Tensor:
        return pk.linear_ppo_loss(*given, of.ids, of.old, of.advantages, backend=backend).loss

    def log_probs(*given: Tensor, backend: str | None = None) -> Tensor:
        return pk.linear_log_probs(*given, of.ids, backend=backend)

    def nll(*given: Tensor, backend: str | None = None) -> Tensor:
        return pk.linear_nll(*given, of.ids, backend=backend)

    def plain(*given: Tensor) -> Tensor:
        return formulas.linear_nll(*given, of.ids)

    rows = []
    for name, function, ours, upstream in (
        ("linear_log_probs", log_probs, log_probs, of.upstream),
        ("linear_nll", nll, nll, None),
        ("linear_ppo_loss", ppo, ppo, None),
        ("eager PyTorch: nll", plain, nll, None),
    ):

        def call(f=function, upstream=upstream) -> Sequence[Tensor]:
            return torch.autograd.grad(f(of.hidden, head), of.hidden, upstream)

        double = None if upstream is None else upstream.double()
        truth = torch.autograd.grad(ours(exact, head.double(), backend="eager"), exact, double)
        rows.append(Way(FROZEN, name, call, 2.0, worst_of(call(), truth)))
    return rows


def worst_of(found: Sequence[Tensor], want: Sequence[Tensor]) -> str:
    pairs = zip(found, want, strict=True)
    return f"{max(((one.double() - other).abs().max() / other.abs().max()).item() for one, other in pairs):.1e}"


def of_logits(of: Inputs) -> list[Way]:
    """A copy moves two bytes for each that log_probs reads once for the results and once for the gradient it writes."""
    source = of.logits.detach()
    ready = torch.empty_like(source)

    def in_place() -> Sequence[Tensor]:
        own = ready.detach().requires_grad_()  # its values do not matter
        return torch.autograd.grad(pk.log_probs(own, of.ids, inplace_backward=True), own, of.upstream)

    def apart() -> Sequence[Tensor]:
        return torch.autograd.grad(pk.log_probs(of.logits, of.ids), of.logits, of.upstream)

    return [
        Way(LOGITS, "a copy into a tensor that is there", lambda: (ready.copy_(source),), 1.0),
        Way(LOGITS, "a copy into a new one (clone)", lambda: (source.clone(),), 1.0),
        Way(LOGITS, "log_probs", apart, 1.5),
        Way(LOGITS, "log_probs, in place", in_place, 1.5),
    ]


def timed(ways: Sequence[Way], rounds: int) -> list[list[float]]:
    """Processor seconds of each way, after one call that does not count unless it is long."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, found in zip(ways, seconds, strict=True):
            if found and found[0] > LONG:
                continue
            start = time.process_time()
            way.call()
            passed = time.process_time() - start
            if turn > 0 or passed > LONG:
                found.append(passed)
    return seconds


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="products.py", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args(argv).rounds
    torch.set_num_threads(1)
    of = Inputs()
    bare = products(of)
    ways = [bare[0], *forwards(of), bare[1], *losses(of), bare[2], *frozen(of), *of_logits(of)]
    found = timed(ways, rounds)
    rows: list[dict[str, str]] = []
    first: dict[str, tuple[Way, list[float]]] = {}
    for way, seconds in zip(ways, found, strict=True):
        base, of_base = first.setdefault(way.group, (way, seconds))
        shares = []
        for pick in (statistics.median, min):
            fair = pick(of_base) * way.work / base.work
            # Time over the products' time; of a copy its rate, as more is better there.
            shares.append(f"{fair / pick(seconds):.2f}" if way.group == LOGITS else f"{pick(seconds) / fair:.2f}")
        rows.append({
            "passes": way.group, "way": way.name, "median ms": f"{1e3 * statistics.median(seconds):.1f}",
            "least ms": f"{1e3 * min(seconds):.1f}", "of the first, median / least": " / ".join(shares),
            "worst error": way.error,
        })  # fmt: skip
    print(markdown.table(rows))
    print(environment())


if __name__ == "__main__":
    main(sys.argv[1:])
