"""The CPU kernels of output layers: float32 logits, and the same bits whatever else is in a call.

They run on the instruction set in use; test_isa.py and test_emulated_isa.py run them on the others.
"""

import functools
import math
import subprocess
import sys

import pytest
import torch

import prime_kernels as pk
from prime_kernels.ops import _tiled_head

pytestmark = pytest.mark.usefixtures("native")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# [tokens, width, vocabulary] around the edges of panels, strips, steps of the width and blocks of the vocabulary.
SHAPES = [
    (1, 1, 1),
    (3, 7, 15),
    (17, 64, 17),
    (5, 33, 16),
    (33, 97, 193),
    (40, 31, 1100),
    (2, 3, 151936),
    (65, 577, 301),
]
# Relative error of a gradient. Of 16-bit inputs the gradients of logits and the result are rounded, and sums cancel.
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["kept", "recomputed"])
def keeps(request, monkeypatch):
    if request.param == "recomputed":
        monkeypatch.setattr(_tiled_head, "KEPT_BYTES", {"cpu": 0})


def inputs(tokens, width, vocabulary, dtype=torch.float32, bias=True, size=4.0):
    """Hidden states, weight and bias with logits of about this standard deviation."""
    hidden = torch.randn(tokens, width)
    weight = torch.randn(vocabulary, width) * size / math.sqrt(width)
    leaves = [each.to(dtype).requires_grad_() for each in (hidden, weight, torch.randn(vocabulary))]
    return (*leaves[:2], leaves[2] if bias else None), torch.randint(vocabulary, (tokens,))


def truth(head, ids, temperature=1.0, softcap=None):
    """(logp, entropy) in float64 of the same inputs."""
    hidden, weight, bias = (None if each is None else each.double() for each in head)
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = (z / temperature).log_softmax(-1)
    p = log_p.exp()
    return log_p[torch.arange(len(ids)), ids], -(p * log_p.where(p > 0, 0.0)).sum(-1)


def ours(head, ids, **options):
    options = {"with_entropy": True, "backend": "cpu", "bias": head[2]} | options
    return pk.linear_log_probs(*head[:2], ids, **options)


def gradients(results, head, upstream):
    leaves = [leaf for leaf in head if leaf is not None]
    return torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)])


def assert_near(got, want, allowed):
    error = (got.double() - want).norm() / want.norm().clamp(min=0.1)
    assert error <= allowed, error


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(keeps, shape, dtype, bias):
    head, ids = inputs(*shape, dtype, bias)
    upstream = torch.randn(shape[0]), torch.randn(shape[0])
    for temperature in (1.0, 0.7):
        got, want = ours(head, ids, temperature=temperature), truth(head, ids, temperature)
        for mine, exact in zip(got, want, strict=True):
            torch.testing.assert_close(mine.double(), exact.detach(), rtol=5e-7, atol=2e-5)
        of_want = gradients(want, head, upstream)
        for mine, exact in zip(gradients(got, head, upstream), of_want, strict=True):
            assert mine.dtype == dtype
            assert_near(mine, exact.double(), GRADIENT[dtype])


@pytest.mark.parametrize("shape", [(17, 64, 17), (33, 97, 193), (40, 31, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 5.0, 300.0])
def test_capped_logits(keeps, shape, dtype, softcap):
    """Logits far beyond the cap, about it, and far below it, where tanh is nearly the identity."""
    head, ids = inputs(*shape, dtype)
    upstream = torch.randn(shape[0]), torch.randn(shape[0])
    options = {"temperature": 0.7, "softcap": softcap}
    got, want = ours(head, ids, **options), truth(head, ids, **options)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=5e-7, atol=2e-5)
    of_want = gradients(want, head, upstream)
    for mine, exact in zip(gradients(got, head, upstream), of_want, strict=True):
        assert mine.dtype == dtype
        assert_near(mine, exact.double(), GRADIENT[dtype])


def test_a_cap_bounds_infinite_logits(keeps):
    """-inf and inf are -softcap and softcap, without a gradient; NaN stays NaN in its own row."""
    head, ids = inputs(9, 33, 200)
    ids = ids % 190 + 5
    with torch.no_grad():
        head[2][:5], head[2][5:7] = -torch.inf, torch.inf
    got, upstream = ours(head, ids, softcap=3.0), (torch.randn(9), torch.randn(9))
    finite = [leaf.detach().clone().requires_grad_() for leaf in head]
    with torch.no_grad():
        finite[2][:5], finite[2][5:7] = -1e4, 1e4
    want = truth(finite, ids, softcap=3.0)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=5e-7, atol=2e-5)
    found, exact = gradients(got, head, upstream), gradients(want, finite, upstream)
    for mine, wanted in zip(found, exact, strict=True):
        assert_near(mine, wanted.double(), 1e-5)
    assert not found[2][:7].any() and not found[1][:7].any()
    with torch.no_grad():
        head[0][4] = torch.nan
    after = ours(head, ids, softcap=3.0)
    others = torch.arange(9) != 4
    assert after[0][4].isnan() and torch.equal(after[0][others], got[0][others])


@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.parametrize("through", [0, 1])
def test_one_gradient_missing_and_one_result_used(keeps, frozen, through):
    head, ids = inputs(20, 33, 300)
    head[frozen].requires_grad_(False)
    leaves, upstream = [leaf for leaf in head if leaf.requires_grad], torch.randn(20)
    got = torch.autograd.grad(ours(head, ids)[through], leaves, upstream)
    want = torch.autograd.grad(truth(head, ids)[through], leaves, upstream.double())
    for mine, exact in zip(got, want, strict=True):
        assert_near(mine, exact.double(), 1e-5)


def test_every_entry_of_the_vocabulary_is_found():
    (hidden, weight, bias), _ = inputs(1, 40, 450)
    every = ours((hidden.expand(450, 40), weight, bias), torch.arange(450))[0]
    assert every.double().exp().sum().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(every, truth((hidden.expand(450, 40), weight, bias), torch.arange(450))[0].float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minus_infinity(keeps, dtype):
    """The first blocks and the last entry have probability 0; the entropy and every gradient stay finite."""
    head, ids = inputs(20, 33, 700, dtype)
    with torch.no_grad():
        head[2][:450] = head[2][699] = -torch.inf
    ids = ids % 249 + 450
    got, upstream = ours(head, ids), (torch.randn(20), torch.randn(20))
    kept = head[0].detach(), head[1].detach()[450:699], head[2].detach()[450:699]
    kept = [each.requires_grad_() for each in kept]
    want = truth(kept, ids - 450)
    for mine, exact in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=5e-7, atol=2e-5)
    found, exact = gradients(got, head, upstream), gradients(want, kept, upstream)
    assert_near(found[0], exact[0].double(), GRADIENT[dtype])
    for mine, wanted in zip(found[1:], exact[1:], strict=True):
        assert_near(mine[450:699], wanted.double(), GRADIENT[dtype])
        assert not mine[:450].any() and not mine[699].any()
    assert ours(head, ids.where(ids != ids[0], 3))[0][0] == -torch.inf  # a token that cannot be
    with torch.no_grad():
        head[2][:] = -torch.inf
    assert all(column.isnan().all() for column in ours(head, ids))


def test_a_token_that_cannot_be_read_spoils_no_other(keeps):
    head, ids = inputs(40, 33, 300)
    before = ours(head, ids)
    for bad in (torch.nan, torch.inf):
        with torch.no_grad():
            head[0][7] = bad
        after = ours(head, ids)
        others = torch.arange(40) != 7
        for old, new in zip(before, after, strict=True):
            assert new[7].isnan() and torch.equal(old[others], new[others])


def test_a_sure_token_keeps_its_digits():
    hidden, weight = torch.tensor([[1.0]]), torch.zeros(300, 1)
    for logit in (10.0, 30.0):
        weight[123] = logit
        got = pk.linear_log_probs(hidden, weight, torch.tensor([123]), backend="cpu")
        assert got.item() == pytest.approx(-math.log1p(299 * math.exp(-logit)), rel=1e-6)


@pytest.mark.parametrize(
    ("width", "vocabulary", "largest", "allowed"), [(576, 8000, 20.0, 2e-5), (4096, 2000, 60.0, 1e-4)]
)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_error_of_a_log_prob(width, vocabulary, largest, allowed, softcap):
    """Logits are summed in steps: the error of large ones does not grow with the width."""
    head, ids = inputs(32, width, vocabulary, torch.bfloat16, bias=False)
    with torch.no_grad():
        head[1].mul_(largest / (head[0] @ head[1].T).abs().max())
    for mine, exact in zip(ours(head, ids, softcap=softcap), truth(head, ids, softcap=softcap), strict=True):
        assert (mine.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"logits_dtype": "input", "temperature": 0.7}], ids=str)
def test_a_token_has_the_same_bits_whatever_is_beside_it(dtype, options):
    """Alone, in any order, in rows, beside masked ones, on any threads, with and without gradient and entropy."""
    (hidden, weight, bias), ids = inputs(150, 100, 1500, dtype)
    plain = hidden.detach(), weight.detach(), bias.detach()

    values = functools.partial(ours, **options)
    logp, entropy = values(plain, ids)

    def same(got, place=slice(None)):
        assert torch.equal(got[0].flatten(), logp[place]) and torch.equal(got[1].flatten(), entropy[place])

    for place in (0, 77, 149):
        same(values((plain[0][place : place + 1], *plain[1:]), ids[place : place + 1]), slice(place, place + 1))
    order = torch.randperm(150)
    same(values((plain[0][order], *plain[1:]), ids[order]), order)
    same(values((plain[0].view(10, 15, 100), *plain[1:]), ids.view(10, 15)))
    padded = values((torch.cat([plain[0] * 9, plain[0]]), *plain[1:]), ids.repeat(2))
    same([column[150:] for column in padded])
    mask = torch.rand(150) < 0.5
    masked = values(plain, ids, mask=mask)
    same([column[mask] for column in masked], mask)
    same(values((hidden, weight, bias), ids))
    assert torch.equal(values(plain, ids, with_entropy=False), logp)
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        same(values(plain, ids))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradients_have_the_same_bits(monkeypatch, dtype, softcap):
    """Whatever the threads and whether logits are kept; those of hidden states also whatever is beside them."""
    head, ids = inputs(150, 100, 2500, dtype)
    upstream = torch.randn(150), torch.randn(150)
    want = gradients(ours(head, ids, softcap=softcap), head, upstream)
    for threads, kept in ((1, 2**28), (1, 0), (3, 0), (3, 2**28)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(_tiled_head, "KEPT_BYTES", {"cpu": kept})
        assert all(map(torch.equal, want, gradients(ours(head, ids, softcap=softcap), head, upstream)))
    one = [leaf.detach().requires_grad_() for leaf in (head[0][99:100], *head[1:])]
    alone = gradients(ours(one, ids[99:100], softcap=softcap), one, [g[99:100] for g in upstream])
    assert torch.equal(alone[0], want[0][99:100])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_equal_heads_give_a_ratio_of_exactly_zero(dtype, softcap):
    """Though a gradient is wanted of one, and their rows lie apart in memory."""
    head, ids = inputs(70, 50, 900, dtype)
    apart = torch.cat([head[1], head[1]], 1).detach()[:, :50]
    others = pk.Head(head[0].detach(), apart, head[2].detach(), softcap=softcap)
    ratios = pk.linear_log_ratios(pk.Head(*head, softcap=softcap), others, ids, backend="cpu")
    assert not ratios.log_ratio.any() and ratios.prm_logp.requires_grad


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_as_the_layer_rounds_them(keeps, backend, dtype, bias):
    """Small whole numbers, whose products are exact: only the rounding of the logit remains."""
    hidden, weight = torch.randint(-20, 21, (20, 30)).to(dtype), torch.randint(-20, 21, (300, 30)).to(dtype)
    offset = torch.randint(-20, 21, (300,)).to(dtype) if bias else None
    leaves = [None if each is None else (each / 64).requires_grad_() for each in (hidden, weight, offset)]
    ids = torch.randint(300, (20,))
    z = torch.nn.functional.linear(*(None if each is None else each.double() for each in leaves))
    rounded = z.float().to(dtype).double()
    exact = (z + (rounded - z).detach()).log_softmax(-1)[torch.arange(20), ids]
    options = {"with_entropy": False, "backend": backend}
    got = ours(leaves, ids, logits_dtype="input", **options)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-6)
    upstream = [torch.randn(20)]
    for mine, wanted in zip(gradients([got], leaves, upstream), gradients([exact], leaves, upstream), strict=True):
        assert_near(mine, wanted.double(), 2 * GRADIENT[dtype])
    unrounded = ours(leaves, ids, **options)
    assert torch.equal(unrounded, got) == (dtype == torch.float32)
    with pytest.raises(ValueError, match='logits_dtype: expected "float32" or "input", got \'bfloat16\''):
        ours(leaves, ids, logits_dtype="bfloat16", **options)


@pytest.mark.parametrize("loss", ["nll", "ppo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses(keeps, loss, dtype):
    head, ids = inputs(50, 33, 1200, dtype)
    advantages, mask = torch.randn(50), torch.rand(50) < 0.7
    old = truth(head, ids)[0].detach().float() + 0.3 * torch.randn(50)

    def value(logp):
        if loss == "nll":
            return -(logp * mask).sum() / mask.sum()
        return pk.ppo_loss(logp, old.to(logp.dtype), advantages.to(logp.dtype), mask=mask, backend="eager").loss

    options = {"bias": head[2], "mask": mask, "backend": "cpu"}
    if loss == "nll":
        got = pk.linear_nll(*head[:2], ids, **options)
    else:
        got = pk.linear_ppo_loss(*head[:2], ids, old, advantages, **options).loss
    want = value(truth(head, ids)[0])
    assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-6)
    for mine, exact in zip(torch.autograd.grad(got, head), torch.autograd.grad(want, head), strict=True):
        assert_near(mine, exact.double(), GRADIENT[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_factor_of_a_loss_is_not_rounded(keeps, dtype):
    """Halfway between two numbers of the dtype, it would be off by half a place in every element if it were rounded."""
    head, ids = inputs(50, 33, 1200, dtype)
    weights, half = torch.rand(50), torch.finfo(dtype).eps / 2
    loss = pk.linear_nll(*head[:2], ids, bias=head[2], weights=weights, backend="cpu")
    leaves = [each.detach().double().requires_grad_() for each in head]
    want = -(truth(leaves, ids)[0] * weights).sum() / 50
    mine = torch.autograd.grad(loss, head, torch.tensor(1 + half))
    exact = torch.autograd.grad(want, leaves, torch.tensor(1 + half, dtype=torch.float64))
    for one, other in zip(mine, exact, strict=True):
        assert (one.double() - other).norm() < 0.8 * half * other.norm()


@pytest.mark.parametrize("shape", [(1, 1, 2), (17, 64, 17), (33, 97, 193), (40, 31, 1100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
def test_several_ids(keeps, shape, dtype, options):
    """In one pass: the first with the bits that it has alone, some of them twice, one of them nearly sure."""
    head, ids = inputs(*shape, dtype)
    ids = torch.cat([ids.unsqueeze(1), torch.randint(shape[2], (shape[0], 3)), ids.unsqueeze(1)], 1)
    with torch.no_grad():
        head[2][ids[0, 1]] += 30.0
    logp, entropy = ours(head, ids, **options)
    alone = ours(head, ids[:, 0], **options)
    assert torch.equal(logp[:, 0], alone[0]) and torch.equal(entropy, alone[1])
    per_id = [truth(head, ids[:, k], **options) for k in range(5)]
    want = torch.stack([each[0] for each in per_id], 1), per_id[0][1]
    for mine, exact in zip((logp, entropy), want, strict=True):
        torch.testing.assert_close(mine.double(), exact.detach(), rtol=5e-7, atol=2e-5)
    upstream = torch.randn(shape[0], 5), torch.randn(shape[0])
    for mine, exact in zip(gradients((logp, entropy), head, upstream), gradients(want, head, upstream), strict=True):
        assert_near(mine, exact.double(), GRADIENT[dtype])


@pytest.mark.parametrize("shape", [(3, 7, 15), (33, 97, 193), (40, 31, 1100), (2000, 577, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "temperature": 0.7}, {"logits_dtype": "input"}], ids=str)
def test_candidates(shape, dtype, options):
    """All of them, of tokens in several chunks and blocks, with the bits of the log-probs."""
    head, ids = inputs(*shape, dtype, size=2.0)
    with torch.no_grad():
        head[1][:, 0] += torch.arange(shape[2]) % 7 == 3  # likely ones in every block
        head[0][0] = torch.nan
    shared = {key: options[key] for key in options if key != "softcap"}
    scored = pk.Head(*head, softcap=options.get("softcap"))
    got = pk.candidates(scored, ids, min_prob=0.0313, backend="cpu", **shared)
    every = ours(head, torch.arange(shape[2]).expand(shape[0], -1), **options)[0].detach()
    best = every.masked_fill(every.isnan(), -torch.inf).sort(dim=1, descending=True).values
    best = torch.nn.functional.pad(best, (0, 31), value=-torch.inf)[:, :31]
    keep = best >= math.log(0.0313) - 1e-6
    assert keep.sum() > shape[0] // 2 and not keep[0].any()
    assert torch.equal(got.counts, keep.sum(1))
    torch.testing.assert_close(got.logp, best.where(keep, -torch.inf), rtol=1e-6, atol=2e-5)
    found = every.gather(1, got.ids).where(keep, -torch.inf)  # equally probable ones may come in either order
    torch.testing.assert_close(found, got.logp, rtol=1e-6, atol=2e-5)
    assert torch.equal(got.token_logp[1:], ours(head, ids, **options)[0][1:])
    beside = ours(head, torch.cat([ids.unsqueeze(1), got.ids], 1), **options)[0][:, 1:]
    assert torch.equal(beside.where(keep, -torch.inf), got.logp)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        again = pk.candidates(scored, ids, min_prob=0.0313, backend="cpu", **shared)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(again[:3], got[:3], strict=True))


SCRATCH = """
import torch
import prime_kernels as pk
torch.set_num_threads(2)
hidden, weight, ids = torch.randn({tokens}, {width}), torch.randn({vocabulary}, {width}), torch.zeros({tokens}).long()
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
with torch.no_grad():
    pk.linear_log_probs(hidden[:1], weight[:1], ids[:1], backend="cpu")
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    pk.linear_log_probs(hidden, weight, ids, with_entropy=True, backend="cpu")
print(peak() - before)
"""


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(40000, 8, 20000), (3000, 2048, 300), (60, 8, 151936)])
def test_scratch_memory_of_the_forward(tokens, width, vocabulary):
    """KiB, by the system's count: below 16 MiB, though all logits take from 3 MB to 3 GB."""
    code = SCRATCH.format(tokens=tokens, width=width, vocabulary=vocabulary)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process reset its peak memory")
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) < 16 * 1024
