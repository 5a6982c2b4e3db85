"""Log-probs and log-ratios of bfloat16 logits: eager PyTorch, torch.compile of it, the kernels, and peers.

`make bench` runs it; bench/table.py turns its JSON into a table. PRIME_BENCH_DEVICE=cuda times CUDA tensors, at the
sizes that a GPU is measured at.
"""

import pytest
import torch
from measure import DEVICE, SMALL, compiled, forward_backward, leaf, timed, without_gradients

import prime_kernels as pk
from prime_kernels._bench import formulas, operations

TOKENS, VOCABULARY = (8192, 151936) if DEVICE == "cuda" else (1024, 49152)
if SMALL:
    TOKENS, VOCABULARY = 8, 256


def kernel_entropy(logits, ids, **options):
    return pk.log_probs(logits, ids, with_entropy=True, **options)


def kernel_in_place(logits, ids, **options):
    return pk.log_probs(logits, ids, inplace_backward=True, **options)


def peer(name):
    """Another package's function; the benchmark is skipped where it is not installed."""
    module, _, function = formulas.PEERS["log_probs"][name]

    def call(*arguments):
        pytest.importorskip(module, reason=f"{module} is not installed")
        return function(*arguments)

    return call


def on(backend, function):
    """``function`` with its kernels on one backend."""

    def call(*arguments):
        return function(*arguments, backend=backend)

    def skip(*arguments):
        pytest.skip(f"backend {backend!r}: {reason}")

    reason = pk.available_backends()[backend]
    return call if reason is None else skip


BACKENDS = ("triton", "cuda") if DEVICE == "cuda" else ("cpu",)
PEERS = {name: peer(name) for name in formulas.PEERS["log_probs"]} if DEVICE == "cuda" else {}


def ways(plain, ours, peers):
    return {"eager": plain, "compile": compiled(plain)} | {name: on(name, ours) for name in BACKENDS} | peers


RATIOS = ways(formulas.log_ratios, operations.log_ratios, {})
SINGLE = ways(formulas.log_probs, pk.log_probs, PEERS)
ENTROPY = ways(formulas.entropy, kernel_entropy, {})
CANDIDATES = ways(formulas.candidates, operations.candidates, {})


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)


def logits():
    return leaf(TOKENS, VOCABULARY, scale=3.0)


@pytest.mark.parametrize("way", RATIOS)
@pytest.mark.benchmark(group="log_ratios of three models, forward")
def test_log_ratios(benchmark, ids, way):
    models = [logits() for _ in range(3)]
    timed(benchmark, without_gradients(lambda: RATIOS[way](*models, ids)), sum(z.nbytes for z in models))


@pytest.mark.parametrize("way", CANDIDATES)
@pytest.mark.benchmark(group="candidates, forward")
def test_candidates(benchmark, ids, way):
    z = logits()
    timed(benchmark, without_gradients(lambda: CANDIDATES[way](z, ids)), z.nbytes)


@pytest.mark.parametrize("way", SINGLE)
@pytest.mark.benchmark(group="log_probs, forward")
def test_log_probs(benchmark, ids, way):
    z = logits()
    timed(benchmark, without_gradients(lambda: SINGLE[way](z, ids)), z.nbytes)


@pytest.mark.parametrize("way", SINGLE)
@pytest.mark.benchmark(group="log_probs, forward and backward")
def test_log_probs_backward(benchmark, ids, way):
    z = logits()
    timed(benchmark, forward_backward(lambda: SINGLE[way](z, ids), [z]), 3 * z.nbytes)


@pytest.mark.parametrize("way", BACKENDS)
@pytest.mark.benchmark(group="log_probs, forward and backward")
def test_log_probs_backward_in_place(benchmark, ids, way):
    """The logits become gradients of gradients from round to round, which takes as long."""
    z = logits()
    ours = on(way, kernel_in_place)
    timed(benchmark, forward_backward(lambda: ours(z, ids), [z]), 3 * z.nbytes)


@pytest.mark.parametrize("way", ENTROPY)
@pytest.mark.benchmark(group="log_probs with entropy, forward")
def test_entropy(benchmark, ids, way):
    z = logits()
    timed(benchmark, without_gradients(lambda: ENTROPY[way](z, ids)), z.nbytes)
