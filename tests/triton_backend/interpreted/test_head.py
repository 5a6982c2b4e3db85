"""The product with the softmax in its epilogue: small tiles, padding, few programs, and the operations with it."""

import pytest
import torch
from helpers.support import assert_close

import prime_kernels as pk
from prime_kernels import _tuning
from prime_kernels._backends import LinearHead
from prime_kernels._triton import _launch_config, head
from prime_kernels._triton._launch_config import HeadConfig
from prime_kernels.ops import _tiled_head

# Tiles of 16 x 16, groups of two row blocks: the interpreter, which has one multiprocessor, runs this many programs.
SMALL = {programs: HeadConfig(16, 16, 16, 4, 2, 2, programs) for programs in (1, 3)}


def truth(hidden, weight, bias, ids, temperature):
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    log_p = (z / temperature).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return log_p.gather(1, ids[:, None])[:, 0], (z / temperature).logsumexp(-1), entropy, z


@pytest.mark.parametrize("programs", SMALL)
@pytest.mark.parametrize("rows, vocabulary, width", [(1, 1, 8), (16, 64, 16), (17, 65, 24), (70, 100, 8), (5, 15, 40)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tiles_and_programs(rows, vocabulary, width, programs, dtype):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    ids = torch.randint(vocabulary, (rows,))
    for bias in (None, torch.randn(vocabulary).to(dtype)):
        of = LinearHead(hidden, weight, bias, ids, 0.7, False)
        z = torch.full((rows, vocabulary + 15 & ~7), torch.nan)
        got = head.token_log_probs(of, True, SMALL[programs], z[:, :vocabulary])
        *want, exact = truth(hidden, weight, bias, ids, 0.7)
        for mine, wanted in zip(got, want, strict=True):
            assert_close("logp", mine, wanted, extent=20.0)
        assert_close("logp", z[:, :vocabulary], exact, extent=20.0)
        assert z[:, vocabulary:].isnan().all()
        again = head.token_log_probs(of, False, SMALL[programs])
        assert all(map(torch.equal, again[:2], got[:2])) and again.entropy is None
        alone = torch.empty_like(z)[:, :vocabulary]
        head.logits(of, alone, SMALL[programs])
        assert torch.equal(alone, z[:, :vocabulary])


def test_impossible_tokens_and_tiles():
    hidden, weight, bias = torch.randn(9, 8).half(), torch.randn(64, 8).half(), torch.zeros(64).half()
    bias[16:48] = -torch.inf
    ids = torch.tensor([0, 15, 16, 47, 48, 63, 20, 1, 2])
    logp, lse, entropy = head.token_log_probs(LinearHead(hidden, weight, bias, ids, 1.0, False), True, SMALL[1])
    exact = truth(hidden, weight, bias, ids, 1.0)
    assert bool((logp[[2, 3, 6]] == -torch.inf).all())
    possible = exact[0] > -torch.inf
    assert_close("logp", logp[possible], exact[0][possible], extent=20.0)
    assert_close("logp", lse, exact[1], extent=20.0)
    assert_close("logp", entropy, exact[2], extent=20.0)


def test_the_tail_beside_a_sure_token_keeps_its_digits():
    hidden, weight = torch.ones(1, 8).half(), torch.zeros(40, 8).half()
    weight[20] = 4.0
    of = LinearHead(hidden, weight, None, torch.tensor([20]), 1.0, False)
    logp, _, entropy = head.token_log_probs(of, True, SMALL[1])
    want = truth(hidden, weight, None, of.ids, 1.0)
    torch.testing.assert_close(logp.double(), want[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(entropy.double(), want[2], rtol=1e-5, atol=0.0)


@pytest.fixture
def tuned(monkeypatch):
    """The operations go through the kernel; `calls` has its launches."""
    monkeypatch.setattr(_launch_config, "HEAD_CONFIGS", {256: SMALL[3]})
    monkeypatch.setattr(head, "HEAD_CONFIGS", {256: SMALL[3]})
    monkeypatch.setattr(_tiled_head, "TOKENS", {"cpu": 16})
    for name, columns in (("FORWARD_ELEMENTS", 24), ("BACKWARD_ELEMENTS", 64)):
        monkeypatch.setattr(_tiled_head, name, {"cpu": 16 * columns})
    calls, plain = [], head._launch
    monkeypatch.setattr(head, "_launch", lambda *a, **k: calls.append(k) or plain(*a, **k))

    def run(call, kept):
        tiles = {"fused_columns": 256, "kept_bytes": 2**20 if kept else 1}
        calls.clear()
        with _tuning.trial(_tuning.none()._replace(tiles=tiles)):
            return call(), len(calls)

    return run


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_log_probs_and_gradients(tuned, bias):
    """One launch where the logits are kept, else one more a tile of the backward pass; the same bits."""
    of = [torch.randn(20, 8), torch.randn(70, 8), torch.randn(70)][: 2 + bias]
    of, ids, upstream = [each.bfloat16().requires_grad_() for each in of], torch.randint(70, (20,)), torch.randn(20)

    def run():
        logp = pk.linear_log_probs(*of[:2], ids, bias=of[2] if bias else None, backend="triton")
        return [logp.detach(), *torch.autograd.grad(logp, of, upstream)]

    (kept, launches), (recomputed, more) = tuned(run, True), tuned(run, False)
    assert launches == 1 and more > 2 and all(map(torch.equal, kept, recomputed))
    with torch.no_grad():
        scored, launches = tuned(
            lambda: pk.linear_log_probs(*of[:2], ids, bias=of[2] if bias else None, backend="triton"), False
        )
    assert launches == 1 and torch.equal(scored, kept[0])
    exact = [each.detach().double().requires_grad_() for each in of]
    logp = truth(*exact[:2], exact[2] if bias else None, ids, 1.0)[0]
    assert_close("logp", kept[0], logp.detach(), extent=20.0)
    for mine, want in zip(kept[1:], torch.autograd.grad(logp, exact, upstream.double()), strict=True):
        assert (mine.double() - want).abs().max() <= 2**-6 * want.abs().max()


def test_a_loss(tuned):
    of = [torch.randn(n, 8).bfloat16().requires_grad_() for n in (20, 70)]
    ids = torch.randint(70, (20,))

    def run():
        loss = pk.linear_nll(*of, ids, backend="triton")
        return [loss, *torch.autograd.grad(loss, of)]

    (loss, *grads), launches = tuned(run, False)
    assert launches == 1
    exact = [each.detach().double().requires_grad_() for each in of]
    want = -truth(*exact, None, ids, 1.0)[0].mean()
    assert_close("logp", loss, want.detach(), extent=20.0)
    for mine, wanted in zip(grads, torch.autograd.grad(want, exact), strict=True):
        assert (mine.double() - wanted).abs().max() <= 2**-6 * wanted.abs().max()


OTHERS = {
    "float32": lambda h: (h.float(), {}),
    "capped": lambda h: (h, {"softcap": 5.0}),
    "rounded": lambda h: (h, {"logits_dtype": "input"}),
    "rows at odd places": lambda h: (torch.cat([h, h[:, :1]], 1)[:, 1:], {}),
    "one hidden state for all": lambda h: (h[:1].expand(20, 8), {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_goes_through_a_library(tuned, other):
    hidden, options = OTHERS[other](torch.randn(20, 8).bfloat16())
    weight, ids = torch.randn(70, 8).to(hidden.dtype), torch.randint(70, (20,))
    logp, launches = tuned(lambda: pk.linear_log_probs(hidden, weight, ids, backend="triton", **options), False)
    assert launches == 0
    z = hidden.double() @ weight.double().T
    z = 5.0 * torch.tanh(z / 5.0) if "softcap" in options else z
    z = z.to(hidden.dtype).double() if "logits_dtype" in options else z
    torch.testing.assert_close(logp.double(), z.log_softmax(-1).gather(1, ids[:, None])[:, 0], rtol=2e-2, atol=2e-2)
