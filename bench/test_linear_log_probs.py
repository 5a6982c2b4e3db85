"""Log-probs straight from hidden states, against eager PyTorch, torch.compile of it and the bare matrix product."""

import pytest
import torch
from measure import DEVICE, SMALL, forward_backward, leaf, timed, without_gradients

import prime_kernels as pk

TOKENS, WIDTH, VOCABULARY = (8192, 4096, 131072) if DEVICE == "cuda" else (1024, 576, 49152)
if SMALL:
    TOKENS, WIDTH, VOCABULARY = 8, 16, 256
FLOPS = 2 * TOKENS * WIDTH * VOCABULARY


def eager(hidden, weight, ids):
    return (hidden @ weight.T).float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def kernel(hidden, weight, ids):
    return pk.linear_log_probs(hidden, weight, ids)


WAYS = {"eager": eager, "compile": torch.compile(eager), "kernel": kernel}


@pytest.fixture
def inputs():
    ids = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)
    return leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH, scale=0.1), ids


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group="linear_log_probs, forward")
def test_forward(benchmark, inputs, way):
    timed(benchmark, without_gradients(lambda: WAYS[way](*inputs)), flops=FLOPS)


@pytest.mark.benchmark(group="linear_log_probs, forward")
def test_product_alone(benchmark, inputs):
    """Into a buffer that is there already: what no kernel on top of a library product can beat."""
    hidden, weight, _ = inputs
    buffer = torch.empty(TOKENS, VOCABULARY, dtype=hidden.dtype, device=DEVICE)
    timed(benchmark, without_gradients(lambda: torch.mm(hidden, weight.T, out=buffer)), flops=FLOPS)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group="linear_log_probs, forward and backward")
def test_backward(benchmark, inputs, way):
    timed(benchmark, forward_backward(lambda: WAYS[way](*inputs), list(inputs[:2])), flops=3 * FLOPS)
