"""Programs that meet: results do not depend on who comes when, and waiting for each other ends.

The interpreter runs programs one after another, in phases. Here they also run in the opposite order, and at the same
time, each in a process of its own on shared memory, in the one launch that a GPU gets.
"""

import multiprocessing
import time
from collections.abc import Iterator

import pytest
import torch
from helpers.support import offsets
from triton.runtime import interpreter

from prime_kernels import _launch_counters
from prime_kernels._backends import ClipRange, PPOTokens, PRMBatch, RlooBatch, RlooSettings
from prime_kernels._triton import _launch, rloo, segments
from prime_kernels._triton import losses as loss_kernels

LENGTHS = [0, 3, 0, 17, 1, 1, 30, 0, 9, 6]
GROUPS = [1, 0, 4, 5]
TOTAL, PROGRAMS = sum(LENGTHS), 5
# Seconds until programs that wait for each other are held to wait for ever.
PATIENCE = 60


def returns(config, **options):
    torch.manual_seed(1)
    rewards, mask = torch.randn(TOTAL), torch.rand(TOTAL) < 0.7
    over_ranks = options.pop("over_ranks", None)
    options = {"normalize_process": True, "process_baseline": "reference"} | options
    settings = RlooSettings(gamma_process=0.95, gamma_outcome=1.0, process_coef=5.0, outcome_coef=1.0, **options)
    outcomes = torch.rand(len(LENGTHS), dtype=torch.float64)
    batch = RlooBatch(rewards, mask, outcomes, offsets(LENGTHS), offsets(GROUPS), TOTAL)
    return rloo.rloo_returns(batch, settings, over_ranks, config)


def scans(config):
    torch.manual_seed(2)
    return [
        segments.scan_segments(torch.randn(TOTAL), offsets(LENGTHS), 0.9, way, None, config) for way in (False, True)
    ]


def sums(config):
    torch.manual_seed(3)
    return [segments.sum_segments(torch.randn(TOTAL), offsets(LENGTHS), config)]


def losses(config):
    torch.manual_seed(4)
    tokens = PPOTokens(*(torch.randn(TOTAL) for _ in range(3)), weights=None, mask=None)
    outcomes = torch.rand(len(LENGTHS), dtype=torch.float64)
    ppo = loss_kernels.ppo_loss_and_scale(tokens, ClipRange(0.2, 0.2), None, config)
    batch = PRMBatch(tokens.logp, outcomes, offsets(LENGTHS), offsets(GROUPS), None, None)
    return [*ppo, *loss_kernels.prm_loss_and_slope(batch, "dpo", 0.5, config), *prefixes(config)]


def prefixes(config):
    torch.manual_seed(5)
    log_ratio, outcomes = torch.randn(TOTAL), torch.rand(len(LENGTHS), dtype=torch.float64)
    batch = PRMBatch(log_ratio, outcomes, offsets(LENGTHS), offsets(GROUPS), outcomes + 0.5, None)
    return loss_kernels.prefix_loss_and_slope(batch, 2.0, 0.5, config)


def same_bits(one, other):
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.fixture
def counters(monkeypatch) -> Iterator[list[torch.Tensor]]:
    """The counters of all launches, each of which must have left it 0."""
    made, make = [], _launch_counters.arrivals

    def arrivals(device):
        made.append(make(device))
        return made[-1]

    for module in (segments, rloo, loss_kernels):
        monkeypatch.setattr(module, "arrivals", arrivals)
    yield made
    assert made and all(int(each) == 0 for each in made)


@pytest.mark.parametrize("run", [scans, sums, losses, returns])
def test_order_of_programs(run, cut, counters, monkeypatch):
    want = run(cut(TOTAL))
    set_index = interpreter.InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(
        interpreter.InterpreterBuilder,
        "set_grid_idx",
        lambda self, x, y, z: set_index(self, self.grid_dim[0] - 1 - x, y, z),
    )
    assert same_bits(run(cut(TOTAL)), want)


def run_at_once(kernel, config, arguments, first, last, **constants):
    """As launch_phases: one launch, the programs of which are processes that share the memory of the arguments."""
    shared = {}
    for each in arguments:
        if isinstance(each, torch.Tensor) and each.data_ptr() not in shared:
            shared[each.data_ptr()] = (each, each.clone().share_memory_())
    placed = [shared[each.data_ptr()][1] if isinstance(each, torch.Tensor) else each for each in arguments]

    def program(number):
        builder = interpreter.InterpreterBuilder
        builder.set_grid_idx = lambda self, x, y, z: setattr(self, "grid_idx", (number, 0, 0))
        builder.set_grid_dim = lambda self, *dim: setattr(self, "grid_dim", (config.programs, 1, 1))
        interpreter.GridExecutor._restore_args_dev = lambda *_: None
        kernel[(1,)](*placed, FIRST=first, LAST=last, **_launch.options(config), **constants)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=program, args=(number,), daemon=True) for number in range(config.programs)]
    deadline = time.monotonic() + PATIENCE
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [0] * config.programs
    for each, copy in shared.values():
        each.copy_(copy)


@pytest.mark.parametrize(
    "run, options, launches",
    [
        (scans, {}, 2),
        (prefixes, {}, 1),
        (returns, {}, 1),
        (returns, {"over_ranks": lambda largest: largest.mul_(1.5)}, 2),
        (returns, {"normalize_process": False, "process_baseline": "paper"}, 1),
    ],
    ids=["two scans", "losses of prefixes", "returns", "returns over ranks", "returns not normalised"],
)
def test_programs_at_once(run, options, launches, cut, counters, monkeypatch):
    want = run(cut(TOTAL), **options)
    seen = []

    def launch(kernel, *arguments, **constants):
        seen.append(kernel)
        run_at_once(kernel, *arguments, **constants)

    for module in (segments, rloo, loss_kernels):
        monkeypatch.setattr(module, "launch_phases", launch)
    assert cut(TOTAL).programs == PROGRAMS
    assert same_bits(run(cut(TOTAL), **options), want) and len(seen) == launches
