"""The product with the softmax in its epilogue: small tiles, padding, few programs, and the operations with it."""

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.support import assert_close

import prime_kernels as pk
from prime_kernels import _tuning
from prime_kernels._backends import LinearHead, RowGradient
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
        got, _ = head.token_log_probs(of, True, SMALL[programs], z[:, :vocabulary])
        *want, exact = truth(hidden, weight, bias, ids, 0.7)
        for mine, wanted in zip(got, want, strict=True):
            assert_close("logp", mine, wanted, extent=20.0)
        assert_close("logp", z[:, :vocabulary], exact, extent=20.0)
        assert z[:, vocabulary:].isnan().all()
        again, _ = head.token_log_probs(of, False, SMALL[programs])
        assert all(map(torch.equal, again[:2], got[:2])) and again.entropy is None
        alone = torch.empty_like(z)[:, :vocabulary]
        head.logits(of, alone, SMALL[programs])
        assert torch.equal(alone, z[:, :vocabulary])


def test_impossible_tokens_and_tiles():
    hidden, weight, bias = torch.randn(9, 8).half(), torch.randn(64, 8).half(), torch.zeros(64).half()
    bias[16:48] = -torch.inf
    ids = torch.tensor([0, 15, 16, 47, 48, 63, 20, 1, 2])
    (logp, lse, entropy), _ = head.token_log_probs(LinearHead(hidden, weight, bias, ids, 1.0, False), True, SMALL[1])
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
    (logp, _, entropy), _ = head.token_log_probs(of, True, SMALL[1])
    want = truth(hidden, weight, None, of.ids, 1.0)
    torch.testing.assert_close(logp.double(), want[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(entropy.double(), want[2], rtol=1e-5, atol=0.0)


# (hidden, weight) [9, 8], [70, 8]: what makes probabilities differ by much or little, in a tile and between them.
ROWS = {
    "plain": lambda: (torch.randn(9, 8), torch.randn(70, 8)),
    "flat": lambda: (torch.randn(9, 8), torch.randn(70, 8) / 1024),
    "peaked": lambda: (torch.randn(9, 8), torch.randn(70, 8) * 30),
    "one tile far above the others": lambda: (torch.ones(9, 8), torch.randn(70, 8) + torch.eye(70)[:, 20:21] * 6),
    "targets nearly sure": lambda: (torch.ones(9, 8), torch.eye(70)[:, :8] * 16),
    "tiles of -inf": lambda: (torch.ones(9, 8), torch.randn(70, 8).index_fill(0, torch.arange(32, 70), -torch.inf)),
}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("kind", ROWS)
def test_gradients_from_probabilities(kind, temperature):
    """Within the rounding of bfloat16, token by token: kept or made again in parts, of log-probs and entropies."""
    hidden, weight = (each.bfloat16() for each in ROWS[kind]())
    ids = torch.tensor([0, 1, 15, 16, 31, 5, 2, 7, 20])
    of = LinearHead(hidden, weight, None, ids, temperature, False)
    q = torch.full((9, 80), torch.nan, dtype=torch.float16)[:, :70]
    results, highest = head.token_log_probs(of, True, SMALL[3], q=q)
    plain, _ = head.token_log_probs(of, True, SMALL[3])
    assert all(map(torch.equal, results, plain))
    z = (hidden.double() @ weight.double().T).requires_grad_()
    log_p = (z / temperature).log_softmax(-1)
    p = log_p.exp()
    terms = p * log_p.masked_fill(log_p == -torch.inf, 0.0)
    upstream = torch.randn(2, 9)
    loss = upstream[0].double() @ log_p.gather(1, ids[:, None])[:, 0] - upstream[1].double() @ terms.sum(-1)
    rows = [(upstream[0], upstream[1], loss), (upstream[0], None, upstream[0].double() @ log_p.gather(1, ids[:, None]))]
    for grad_logp, grad_entropy, loss in rows:
        want = torch.autograd.grad(loss.sum(), z, retain_graph=True)[0].nan_to_num(0.0)
        gradient = RowGradient(results.lse, results.entropy, grad_logp, grad_entropy)
        kept = head.Probabilities(q.new_empty(9, 80)[:, :70].copy_(q), highest)
        got = head.gradient(kept, ids, results.logp, gradient, temperature, SMALL[3])
        # bfloat16 rounds by 2^-8 and q by 2^-11, which log p has, too; a subnormal q by 2^-40 of the largest.
        of_entropy = 0 if grad_entropy is None else upstream[1].abs()[:, None] * p / temperature
        largest = (highest / temperature - results.lse[:, None]).exp().repeat_interleave(16, 1)[:, :70]
        subnormal = upstream.abs().sum(0)[:, None] * largest / temperature * (1 - log_p.clamp(min=-88)) * 2**-40
        allowed = (2**-8 + 2**-10) * want.abs() + 2**-11 * of_entropy + subnormal + torch.finfo(torch.float32).tiny
        assert ((got.double() - want).abs() <= allowed).all()
        for part in (slice(0, 32), slice(32, 70)):
            made = torch.full((9, -(-(part.stop - part.start) // 16) * 16), torch.nan, dtype=torch.float16)
            some = of._replace(weight=weight[part], ids=ids - part.start)
            again = head.probabilities(some, made[:, : part.stop - part.start], SMALL[1])
            other = head.gradient(again, some.ids, results.logp, gradient, temperature, SMALL[1])
            assert torch.equal(other, got[:, part])


@pytest.fixture
def tuned(monkeypatch):
    """The operations go through the kernel. Their result comes with what each launch stored for a gradient."""
    monkeypatch.setattr(_launch_config, "HEAD_CONFIGS", {256: SMALL[3]})
    monkeypatch.setattr(head, "HEAD_CONFIGS", {256: SMALL[3]})
    monkeypatch.setattr(_tiled_head, "TOKENS", {"cpu": 16})
    for name, columns in (("FORWARD_ELEMENTS", 24), ("BACKWARD_ELEMENTS", 64)):
        monkeypatch.setattr(_tiled_head, name, {"cpu": 16 * columns})
    calls, plain = [], head._launch

    def launch(of, ids, highest, sums, logits, q, *rest, **options):
        calls.append("q" if q is not None else "logits" if logits is not None else None)
        plain(of, ids, highest, sums, logits, q, *rest, **options)

    monkeypatch.setattr(head, "_launch", launch)

    def run(call, kept):
        tiles = {"fused_columns": 256, "kept_bytes": 2**20 if kept else 1}
        calls.clear()
        with _tuning.trial(_tuning.none()._replace(tiles=tiles)):
            return call(), list(calls)

    return run


@pytest.mark.parametrize("entropy", [False, True], ids=["no entropy", "entropy"])
@pytest.mark.parametrize("kind", ["q", "bias", "float16"])
def test_log_probs_and_gradients(tuned, kind, entropy):
    """One launch where something is kept, else one more a tile of the backward pass; the same bits."""
    bias, dtype = kind == "bias", torch.float16 if kind == "float16" else torch.bfloat16
    of = [torch.randn(20, 8), torch.randn(70, 8), torch.randn(70)][: 2 + bias]
    of, ids, upstream = [each.to(dtype).requires_grad_() for each in of], torch.randint(70, (20,)), torch.randn(2, 20)

    def scored():
        options = {"bias": of[2] if bias else None, "with_entropy": entropy, "backend": "triton"}
        found = pk.linear_log_probs(*of[:2], ids, **options)
        return found if entropy else (found,)

    def run():
        found = scored()
        twice = [torch.autograd.grad(found, of, [*upstream[: 1 + entropy]], retain_graph=True) for _ in range(2)]
        return [*(each.detach() for each in found), *twice[0]], twice[1]

    stored = "q" if kind == "q" else "logits"
    ((kept, again), launches), ((recomputed, _), more) = tuned(run, True), tuned(run, False)
    assert launches[0] == stored and more[0] is None and {*more[1:]} == {stored}
    assert len(launches) == 1 + (len(more) - 1) // 2 and len(more) > 4
    assert all(map(torch.equal, kept, recomputed)) and all(map(torch.equal, kept[1 + entropy :], again))
    with torch.no_grad():
        plain, launches = tuned(scored, True)
    assert launches == [None] and all(map(torch.equal, plain, kept))
    exact = [each.detach().double().requires_grad_() for each in of]
    logp, _, entropies, _ = truth(*exact[:2], exact[2] if bias else None, ids, 1.0)
    assert_close("logp", kept[0], logp.detach(), extent=20.0)
    loss = upstream[0].double() @ logp + (upstream[1].double() @ entropies if entropy else 0.0)
    for mine, want in zip(kept[1 + entropy :], torch.autograd.grad(loss, exact), strict=True):
        assert (mine.double() - want).abs().max() <= 2**-6 * want.abs().max()


@pytest.mark.parametrize("kept", [False, True], ids=["gradients forward", "kept"])
def test_a_loss(tuned, kept):
    """One launch: gradients in the forward pass, or of what it kept."""
    of = [torch.randn(n, 8).bfloat16().requires_grad_() for n in (20, 70)]
    ids = torch.randint(70, (20,))

    def run():
        loss = pk.linear_nll(*of, ids, backend="triton")
        return [loss, *torch.autograd.grad(2 * loss, of)]

    (loss, *grads), launches = tuned(run, kept)
    assert launches == ["q" if kept else "logits"]
    exact = [each.detach().double().requires_grad_() for each in of]
    want = -truth(*exact, None, ids, 1.0)[0].mean()
    assert_close("logp", loss, want.detach(), extent=20.0)
    for mine, wanted in zip(grads, torch.autograd.grad(2 * want, exact), strict=True):
        assert (mine.double() - wanted).abs().max() <= 2**-6 * wanted.abs().max()


def test_a_shard_keeps_logits(tuned):
    """The softmax of a shard is joined with those of others afterwards, and an id may be in none of its columns."""
    of = [torch.randn(n, 8).bfloat16().requires_grad_() for n in (20, 70)]
    ids, upstream = torch.randint(70, (20,)), torch.randn(20)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD

        def run():
            logp = pk.linear_log_probs(*of, ids, process_group=group, backend="triton")
            return torch.autograd.grad(logp, of, upstream)

        grads, launches = tuned(run, True)
    finally:
        torch.distributed.destroy_process_group()
    assert launches == ["logits"]
    exact = [each.detach().double().requires_grad_() for each in of]
    logp = truth(*exact, None, ids, 1.0)[0]
    for mine, wanted in zip(grads, torch.autograd.grad(logp, exact, upstream.double()), strict=True):
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
    assert launches == []
    z = hidden.double() @ weight.double().T
    z = 5.0 * torch.tanh(z / 5.0) if "softcap" in options else z
    z = z.to(hidden.dtype).double() if "logits_dtype" in options else z
    torch.testing.assert_close(logp.double(), z.log_softmax(-1).gather(1, ids[:, None])[:, 0], rtol=2e-2, atol=2e-2)


def test_the_search_for_a_configuration(monkeypatch):
    """bench/tune.py at a small size: every way of every candidate has a rate, and none an error."""
    path = Path(__file__).resolve().parents[3] / "bench" / "tune.py"
    spec = importlib.util.spec_from_file_location("tune", path)
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    monkeypatch.setattr(tune, "HEADS", list(SMALL.values()))
    monkeypatch.setattr(tune, "SECONDS", 0.01)
    library, *found = tune.sweep_head(20, 8, 72, torch.device("cpu"))
    assert library["kernel"] == "library product" and [row["programs"] for row in found] == [1, 3]
    assert all(isinstance(row[way], float) for row in found for way in ("scored", "stored", "probabilities"))
