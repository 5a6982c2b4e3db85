"""Log-probs of 1024 bfloat16 tokens over SmolLM2's vocabulary: plain PyTorch against the kernels.

`make bench` runs it. PRIME_BENCH_DEVICE=cuda times CUDA tensors on whatever backend is chosen for them.
"""

import os

import pytest
import torch

import prime_kernels as pk

DEVICE = os.environ.get("PRIME_BENCH_DEVICE", "cpu")
TOKENS, VOCABULARY, WIDTH = 1024, 49152, 576


def plain(logits, ids):
    return logits.float().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def kernel(logits, ids):
    return pk.log_probs(logits, ids)


def plain_linear(hidden, weight, ids):
    return plain(hidden @ weight.T, ids)


def kernel_linear(hidden, weight, ids):
    return pk.linear_log_probs(hidden, weight, ids)


def leaf(*shape, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(torch.bfloat16).requires_grad_()


def timed(benchmark, run, leaves, backward, read):
    """Medians of five rounds after one to warm up; `read` is the bytes that must move at least once."""

    def once():
        with torch.set_grad_enabled(backward):
            result = run()
        if backward:
            result.sum().backward()
            for one in leaves:
                one.grad = None
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(once, rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        benchmark.extra_info["GB/s"] = round(read / benchmark.stats.stats.median / 1e9, 1)
        benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        if DEVICE == "cuda":
            benchmark.extra_info["peak MiB"] = torch.cuda.max_memory_allocated() >> 20


@pytest.fixture
def ids():
    return torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("way", [plain, kernel], ids=["plain", "kernel"])
@pytest.mark.benchmark(group="log_probs")
def test_log_probs(benchmark, ids, way, backward):
    logits = leaf(TOKENS, VOCABULARY, scale=3.0)
    traffic = logits.nbytes * (3 if backward else 1)
    timed(benchmark, lambda: way(logits, ids), [logits], backward, traffic)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("way", [plain_linear, kernel_linear], ids=["plain", "kernel"])
@pytest.mark.benchmark(group="linear_log_probs")
def test_linear_log_probs(benchmark, ids, way, backward):
    hidden, weight = leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH, scale=0.1)
    traffic = (hidden.nbytes + weight.nbytes) * (3 if backward else 1)
    timed(benchmark, lambda: way(hidden, weight, ids), [hidden, weight], backward, traffic)
