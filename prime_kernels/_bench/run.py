"""The measurements, in an order in which whatever ends them early leaves the most: all operations at the smallest size
first, and what compiles for seconds last."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from prime_kernels._bench import timing
from prime_kernels._bench.cases import (
    BACKWARD,
    BOTH,
    COMPILE,
    EAGER,
    FORWARD,
    Call,
    Case,
    Sizes,
    backends,
    bytes_needed,
    cases,
)
from prime_kernels._bench.report import NO_TIME, Row
from prime_kernels._bench.timing import Ceiling

# Of the time for everything, what is left to torch.compile at least: it may take ten seconds for one function.
SHARE_OF_COMPILE = 0.3
LONGEST_SLOT = 2.0
USABLE_MEMORY = 0.8


class Run:
    """Measures ways to compute operations until the time is over."""

    def __init__(self, device: torch.device, rates: Ceiling, levels: Sequence[Sizes], ops: list[str], seconds: float):
        self.device, self.rates, self.ops, self.levels = device, rates, ops, list(levels)
        self.start = time.perf_counter()
        self.seconds = seconds
        self.rows: list[Row] = []

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def measure(self) -> Iterator[Row]:
        """Every row as soon as it is there; those that there is no time or memory for say so."""
        uncompiled = self.seconds * (1 - SHARE_OF_COMPILE)
        for level, sizes in enumerate(self.levels):
            for op in self.ops:
                if level > 0 and self.elapsed() > uncompiled:
                    yield from self._left_out(op, level)
                    continue
                for case in self._cases(sizes, op):
                    ways = {name: (call, False) for name, call in case.others.items()}
                    for backend in backends(self.device):
                        ways[backend] = (_on(case.ours, backend), True)
                    yield from self._case(case, level, ways, uncompiled)
        # At one size, as each is compiled for itself: the largest that has something to compare with.
        for op in self.ops:
            levels = [row.level for row in self.rows if (row.op, row.way) == (op, EAGER) and row.seconds is not None]
            level = max(levels, default=0)
            if self.elapsed() > self.seconds:
                yield from self._left_out(op, level, COMPILE)
                continue
            for case in self._cases(self.levels[level], op):
                yield from self._case(case, level, {COMPILE: (torch.compile(case.others[EAGER]), False)}, self.seconds)

    def _left_out(self, op: str, level: int, way: str | None = None) -> Iterator[Row]:
        """What is not measured once the time is over, as the smallest size had it: its inputs are not even made."""
        smallest = [row for row in self.rows if (row.op, row.level) == (op, 0) and row.way != COMPILE]
        if way is not None:
            smallest = [dataclasses.replace(row, way=way, ours=False) for row in smallest if row.way == EAGER]
        for row in smallest:
            size = f"{self.levels[level].tokens} rows or {self.levels[level].packed} tokens"
            made = Row(op, row.which, size, level, row.way, row.ours, failure=NO_TIME)
            self.rows.append(made)
            yield made

    def _cases(self, sizes: Sizes, op: str) -> Iterator[Case]:
        fitting = _fitting(op, sizes, self.device)
        for case in cases(fitting, self.device, self.rates.dtype, [op]):
            yield case
            del case
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _case(self, case: Case, level: int, ways: dict[str, tuple[Call, bool]], deadline: float) -> Iterator[Row]:
        truth = _truth(case) if level == 0 and self.elapsed() < deadline else {}
        for way, (call, ours) in ways.items():
            for which in case.passes:
                row = Row(case.op, which, case.size, level, way, ours)
                expected = self._expected(row)
                if self.elapsed() + 3 * expected > deadline:
                    row.failure = NO_TIME
                else:
                    self._fill(row, case, call, truth.get(which), deadline)
                self.rows.append(row)
                yield row

    def _expected(self, row: Row) -> float:
        """Seconds of a call as the size before suggests."""
        for before in reversed(self.rows):
            if (before.op, before.which, before.way) == (row.op, row.which, row.way) and before.seconds is not None:
                small, large = self.levels[before.level], self.levels[row.level]
                return before.seconds * max(large.tokens / small.tokens, large.packed / small.packed)
        return 0.0

    def _fill(self, row: Row, case: Case, call: Call, truth: list[Tensor] | None, deadline: float) -> None:
        slot = max(0.05, min(LONGEST_SLOT, (deadline - self.elapsed()) / 40))
        try:
            once, before = _pass(case, row.which, call)
            found = timing.timed(once, self.device, slot, before)
            row.seconds, row.rounds = found.median, found.rounds
            argument = [] if before is None else [before()]
            row.peak = timing.peak_bytes(lambda: once(*argument), self.device)
            if truth is not None:
                row.error = _error(_results(case, row.which, call), truth)
        except torch.OutOfMemoryError:
            row.seconds, row.failure = None, "out of memory"
        except Exception as error:  # of other packages, compilers and drivers: its words are what there is to know
            words = str(error).strip().splitlines() or [""]
            row.seconds, row.failure = None, f"{type(error).__name__}: {words[0][:160]}"
        if row.seconds is not None:
            least = max(
                case.traffic.get(row.which, 0) / self.rates.copy, case.flops.get(row.which, 0) / self.rates.product
            )
            row.of_ceiling = least / row.seconds


def _on(call: Call, backend: str) -> Call:
    def run(*leaves: Tensor) -> Tensor | tuple[Tensor, ...]:
        return call(*leaves, backend=backend)

    return run


def _fitting(op: str, sizes: Sizes, device: torch.device) -> Sizes:
    """Sizes with as many tokens halved as the memory that is free demands."""
    memory = USABLE_MEMORY * timing.free_bytes(device)
    while bytes_needed(op, sizes, device) > memory and sizes.tokens > 1:
        sizes = sizes._replace(tokens=max(1, sizes.tokens // 2), packed=max(8, sizes.packed // 2))
    return sizes


def _listed(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _weights(results: Sequence[Tensor]) -> list[Tensor]:
    """The same gradient of the results whenever it is asked for."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(each.shape, generator=generator).to(each) if each.ndim else torch.ones_like(each)
        for each in results
    ]


def _gradients(results: tuple[Tensor, ...], leaves: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    pairs = [(one, weight) for one, weight in zip(results, weights, strict=True) if one.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return list(torch.autograd.grad([one for one, _ in pairs], wanted, [weight for _, weight in pairs]))


def _pass(case: Case, which: str, call: Call) -> tuple[Callable[..., object], Callable[[], object] | None]:
    """(what is timed, what makes its argument untimed)."""
    if which == FORWARD:

        def forward() -> object:
            with torch.no_grad():
                return call(*case.leaves)

        return forward, None
    weights = _weights(_listed(call(*case.leaves)))
    if which == BACKWARD:
        return (
            lambda results: _gradients(results, case.leaves, weights),
            lambda: _listed(call(*case.leaves)),
        )
    return (lambda: _gradients(_listed(call(*case.leaves)), case.leaves, weights)), None


def _results(case: Case, which: str, call: Call, leaves: list[Tensor] | None = None) -> list[Tensor]:
    """Results of the forward pass, gradients of the backward, or both."""
    leaves = case.leaves if leaves is None else leaves
    if which == FORWARD:
        with torch.no_grad():
            return list(_listed(call(*leaves)))
    results = _listed(call(*leaves))
    gradients = _gradients(results, leaves, _weights(results))
    return [each.detach() for each in results] + gradients if which == BOTH else gradients


def _truth(case: Case) -> dict[str, list[Tensor]]:
    """What each pass gives in float64, of the same rounded inputs; nothing where that does not fit."""
    exact = [
        leaf.detach().double().requires_grad_(leaf.requires_grad) if leaf.is_floating_point() else leaf
        for leaf in case.leaves
    ]
    try:
        return {which: _results(case, which, _on(case.ours, "eager"), exact) for which in case.passes}
    except torch.OutOfMemoryError:
        return {}


def _error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest error of each result relative to its largest value."""
    errors = []
    for one, other in zip(got, want, strict=True):
        size = other.abs().max().item() if other.numel() else 0.0
        gap = (one.double() - other).abs().max().item() if other.numel() else 0.0
        errors.append(gap / size if size > 0 else gap)
    return math.nan if any(map(math.isnan, errors)) else max(errors)
