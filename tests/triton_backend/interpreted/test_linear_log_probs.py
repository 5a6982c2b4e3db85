"""The fused product and softmax by itself, and linear_log_probs with it: small blocks, parts, padding, few programs."""

import pytest
import torch
from helpers.support import assert_close

import prime_kernels as pk
from prime_kernels._triton import _launch_config
from prime_kernels._triton import linear_log_probs as kernels
from prime_kernels._triton._launch_config import Device, LinearConfig, choose_linear


def small(splits, programs):
    return LinearConfig(16, 16, 16, 4, 2, splits, programs)


def truth(hidden, weight, bias, ids, temperature):
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    log_p = (z / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], (z / temperature).logsumexp(-1), entropy


@pytest.mark.parametrize("splits, programs", [(1, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("rows, vocabulary, width", [(1, 1, 8), (16, 64, 16), (17, 65, 24), (33, 100, 8), (5, 15, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_parts_and_programs(rows, vocabulary, width, splits, programs, dtype):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    ids = torch.randint(vocabulary, (rows,))
    for bias in (None, torch.randn(vocabulary).to(dtype)):
        got = kernels.linear_token_log_probs(hidden, weight, bias, ids, 0.7, True, small(splits, programs))
        for mine, exact in zip(got, truth(hidden, weight, bias, ids, 0.7), strict=True):
            assert_close("logp", mine, exact, extent=20.0)
        assert kernels.linear_token_log_probs(hidden, weight, bias, ids, 0.7, False, small(splits, programs))[2] is None


def test_impossible_tokens_and_parts():
    hidden, weight, bias = torch.randn(9, 8), torch.randn(64, 8), torch.zeros(64)
    bias[16:48] = -torch.inf
    ids = torch.tensor([0, 15, 16, 47, 48, 63, 20, 1, 2])
    logp, lse, entropy = kernels.linear_token_log_probs(hidden, weight, bias, ids, 1.0, True, small(4, 2))
    exact = truth(hidden, weight, bias, ids, 1.0)
    assert bool((logp[[2, 3, 6]] == -torch.inf).all())
    possible = exact[0] > -torch.inf
    assert_close("logp", logp[possible], exact[0][possible], extent=20.0)
    assert_close("logp", lse, exact[1], extent=20.0)
    assert_close("logp", entropy, exact[2], extent=20.0)


def test_linear_log_probs_with_it(monkeypatch):
    monkeypatch.setattr(_launch_config, "FUSED_LINEAR", True)
    called = []
    plain = kernels.linear_token_log_probs
    monkeypatch.setattr(
        kernels, "linear_token_log_probs", lambda *a, **k: called.append(1) or plain(*a, small(2, 2), **k)
    )
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    ids, upstream = torch.randint(40, (6,)), torch.randn(6)
    logp = pk.linear_log_probs(hidden, weight, ids, backend="triton")
    exact = truth(hidden, weight, None, ids, 1.0)[0]
    assert called
    assert_close("logp", logp, exact.detach(), extent=20.0)
    for mine, want in zip(
        torch.autograd.grad(logp, [hidden, weight], upstream),
        torch.autograd.grad(exact, [hidden, weight], upstream.double()),
        strict=True,
    ):
        assert_close("grad.float32", mine, want, extent=20.0)
    # Columns of another tensor cannot be copied in bulk: the tiles take over.
    called.clear()
    pk.linear_log_probs(torch.randn(6, 9)[:, 1:], weight, ids, backend="triton")
    assert not called


@pytest.mark.parametrize("rows", [1, 100, 8192, 32768])
def test_tiles_fill_the_device(rows):
    config = choose_linear(rows, 151936, 2, Device(132, (9, 0)))
    row_blocks = -(-rows // config.block_rows)
    assert config.splits & (config.splits - 1) == 0
    assert config.programs == min(132, row_blocks * config.splits)
    assert row_blocks * config.splits >= 132 or config.splits == _launch_config.MAX_SPLITS
