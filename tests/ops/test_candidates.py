"""candidates, log-probs of several ids a row and distribution_ppo_loss against plain loops in float64."""

import math

import pytest
import torch
from helpers.support import assert_close, gradient_kind, seeds
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk
from prime_kernels.ops import _tiled_head
from prime_kernels.ops.candidates import most_candidates


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    with pk.use_backend(backend):
        yield


def near(rows, vocabulary, spread=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(rows, vocabulary, generator=generator)).to(dtype)


def loop(logits, min_prob, temperature=1.0):
    """(ids, logp) of each row's candidates in falling order."""
    found = []
    for row in (logits.double() / temperature).log_softmax(-1).tolist():
        best = [(-logp, v) for v, logp in enumerate(row) if logp >= math.log(min_prob) - 1e-9]
        found.append([(v, -minus) for minus, v in sorted(best)])
    return found


def assert_candidates(got, want, min_prob, extent=0.0):
    most = most_candidates(min_prob)
    flat_ids, flat_logp = got.ids.reshape(-1, most), got.logp.reshape(-1, most)
    assert got.counts.reshape(-1).tolist() == [len(row) for row in want]
    for ids, logp, row in zip(flat_ids, flat_logp, want, strict=True):
        assert ids.tolist() == [v for v, _ in row] + [0] * (most - len(row))
        assert_close("logp", logp, [x for _, x in row] + [-math.inf] * (most - len(row)), extent=extent)


@given(
    rows=st.integers(1, 5),
    vocabulary=st.sampled_from([1, 2, 9, 127, 128, 129, 1023, 1024, 1025, 2100]),
    spread=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    min_prob=st.sampled_from([0.0123, 0.037, 0.11, 0.23, 0.6]),
    temperature=st.sampled_from([0.7, 1.0, 1.9]),
    seed=seeds,
)
def test_matches_loop(rows, vocabulary, spread, min_prob, temperature, seed):
    """With some likely tokens among many. No probability of 1 / n is one of these bounds."""
    logits = near(rows, vocabulary, spread, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    likely = torch.randint(vocabulary, (rows, 4), generator=generator)
    logits.scatter_add_(1, likely, math.log(vocabulary) + torch.randn(rows, 4, generator=generator))
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    got = pk.candidates(logits, ids, min_prob=min_prob, temperature=temperature)
    assert_candidates(got, loop(logits, min_prob, temperature), min_prob, extent=float(logits.abs().max()))
    assert torch.equal(got.token_logp, pk.log_probs(logits, ids, temperature=temperature))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_masks_and_leading_dimensions(dtype):
    logits, mask = near(6, 300, 4.0, dtype).view(2, 3, 300), torch.tensor([[True, False, True], [False, True, True]])
    logits[~mask] = math.nan
    ids = torch.randint(300, (2, 3)).masked_fill(~mask, -5)
    got = pk.candidates(logits, ids, min_prob=0.07, mask=mask)
    assert got.ids.shape == got.logp.shape == (2, 3, 14) and got.counts.shape == (2, 3)
    want = loop(logits.nan_to_num(0.0).view(6, 300), 0.07)
    want = [row if valid else [] for row, valid in zip(want, mask.view(-1).tolist(), strict=True)]
    assert_candidates(got, want, 0.07, extent=16.0)
    assert got.token_logp[~mask].tolist() == [0.0] * 2
    assert pk.candidates(logits, min_prob=0.07, mask=mask).token_logp is None


def test_all_ties_at_the_bound_count():
    """Ten tokens of exactly 0.1 each, in the order of their ids; and none too many where 1 / min_prob is no integer."""
    logits = torch.full((1, 400), -math.inf)
    logits[0, 7:400:40] = 3.0
    got = pk.candidates(logits, min_prob=0.1)
    assert got.counts.tolist() == [10] and got.ids.tolist() == [list(range(7, 400, 40))]
    assert_close("logp", got.logp, [[math.log(0.1)] * 10])
    assert pk.candidates(logits, min_prob=0.10001).counts.tolist() == [0]
    assert [most_candidates(x) for x in (1.0, 0.5, 1 / 3, 0.3, 0.1, 1 / 49, 0.001)] == [1, 2, 3, 3, 10, 49, 1000]


def test_rows_without_a_distribution_have_none():
    logits = torch.zeros(4, 5)
    logits[0, 2], logits[1, 2], logits[2] = math.nan, math.inf, -math.inf
    got = pk.candidates(logits, min_prob=0.2)
    assert got.counts.tolist() == [0, 0, 0, 5] and got.ids[:3].tolist() == [[0] * 5] * 3
    assert (got.logp[:3] == -math.inf).all()


def test_sure_tokens_and_large_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [3e38, -3e38, 3e38], [-1e4, -1e4 + 1.0, -3e4]])
    got = pk.candidates(logits, min_prob=0.2)
    assert got.ids.tolist() == [[0, 0, 0, 0, 0], [0, 2, 0, 0, 0], [1, 0, 0, 0, 0]]
    assert got.counts.tolist() == [1, 2, 2] and got.logp[0, 0] == 0.0


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_head(backend, masked, bias, monkeypatch):
    """Several tiles of tokens and of the vocabulary; logits of the products as the backend has them."""
    monkeypatch.setitem(_tiled_head.TOKENS, "cpu", 4)
    monkeypatch.setitem(_tiled_head.FORWARD_ELEMENTS, "cpu", 160)
    hidden, weight = torch.randn(11, 8), 1.5 * torch.randn(101, 8)
    head = pk.Head(hidden, weight, torch.randn(101) if bias else None, scale=0.8, softcap=20.0)
    mask = torch.rand(11) < 0.7 if masked else None
    ids = torch.randint(101, (11,))
    got = pk.candidates(head, ids, min_prob=0.06, mask=mask, temperature=1.2)
    product = hidden.double() @ weight.double().T + (0.0 if head.bias is None else head.bias.double())
    logits = 20.0 * torch.tanh(0.8 * product / 20.0)
    want = [row if masked is False or mask[n] else [] for n, row in enumerate(loop(logits, 0.06, 1.2))]
    assert sum(map(len, want)) > 11
    assert_candidates(got, want, 0.06, extent=40.0)
    scored = pk.linear_log_probs(hidden, weight, ids, bias=head.bias, mask=mask, temperature=1.5, softcap=25.0)
    if backend != "eager":
        assert torch.equal(got.token_logp, scored)
    assert_close("logp", got.token_logp, scored, extent=40.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_of_a_head(dtype):
    """Of which each backend finds those of the reference: products of small multiples of 1/2 are exact."""
    hidden, weight = (torch.randint(-4, 5, shape).to(dtype) / 2 for shape in ((9, 16), (70, 16)))
    bias = torch.randint(-4, 5, (70,)).to(dtype) / 64
    z = hidden.double() @ weight.double().T + bias.double()
    for logits_dtype, logits in (("float32", z), ("input", z.to(dtype).double())):
        got = pk.candidates(pk.Head(hidden, weight, bias), min_prob=0.0413, logits_dtype=logits_dtype)
        assert_candidates(got, loop(logits, 0.0413), 0.0413, extent=40.0)


def test_head_without_valid_tokens():
    head = pk.Head(torch.randn(3, 4), torch.randn(9, 4))
    got = pk.candidates(head, torch.zeros(3, dtype=torch.int64), mask=torch.zeros(3, dtype=torch.bool))
    assert got.ids.shape == (3, 10) and not got.counts.any() and not got.token_logp.any()
    assert (got.logp == -math.inf).all()
    empty = pk.candidates(pk.Head(torch.randn(0, 4), torch.randn(9, 4)))
    assert empty.ids.shape == (0, 10) and empty.counts.shape == (0,)


# --- several ids a row ---


def truth(logits, ids, mask, temperature, upstream, entropy_upstream):
    """(logp, entropy, gradient) in float64 by autograd of the definition."""
    leaf = logits.detach().double().requires_grad_()
    log_p = (leaf / temperature).log_softmax(-1)
    keep = torch.ones(ids.shape[:-1], dtype=torch.bool) if mask is None else mask
    logp = log_p.gather(-1, ids.where(keep.unsqueeze(-1), 0)).where(keep.unsqueeze(-1), 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).where(keep, 0.0)
    ((logp * upstream).sum() + (entropy * entropy_upstream).sum()).backward()
    return logp.detach(), entropy.detach(), leaf.grad


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_ids_of_logits(dtype, masked, with_entropy):
    logits = near(10, 130, 2.0, dtype).view(2, 5, 130)
    logits[0, 0, 17] += 40.0  # near 1, where g - g p has no digits
    ids = torch.randint(130, (2, 5, 4))
    ids[0, 0], ids[0, 1] = torch.tensor([17, 17, 3, 3]), 9
    mask = torch.rand(2, 5) < 0.6 if masked else None
    if masked:
        mask[0, :2] = True
    upstream, of_entropy = torch.randn(2, 5, 4), torch.randn(2, 5) * with_entropy
    want_logp, want_entropy, want_grad = truth(logits, ids, mask, 0.8, upstream, of_entropy)
    leaf = logits.clone().requires_grad_()
    found = pk.log_probs(leaf, ids, mask=mask, temperature=0.8, with_entropy=with_entropy)
    logp, entropy = found if with_entropy else (found, None)
    assert_close("logp", logp, want_logp, extent=60.0)
    assert torch.equal(logp[..., 0].detach(), pk.log_probs(logits, ids[..., 0], mask=mask, temperature=0.8))
    total = (logp * upstream).sum()
    if with_entropy:
        assert_close("golden", entropy, want_entropy)
        total = total + (entropy * of_entropy).sum()
    total.backward()
    assert_close(gradient_kind(dtype), leaf.grad, want_grad)
    if masked:
        assert not leaf.grad[~mask].any() and not logp[~mask].any()


def test_masked_rows_of_several_ids_are_not_read():
    logits, mask = torch.randn(3, 20), torch.tensor([True, False, True])
    logits[1] = math.nan
    leaf, ids = logits.requires_grad_(), torch.tensor([[1, 2], [-7, 99], [3, 3]])
    logp = pk.log_probs(leaf, ids, mask=mask)
    (logp * torch.tensor([1.0, 2.0])).sum().backward()
    assert logp[1].tolist() == [0.0, 0.0] and not leaf.grad[1].any() and leaf.grad.isfinite().all()


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_several_ids_of_a_head(masked, tiled, monkeypatch):
    if tiled:
        monkeypatch.setitem(_tiled_head.TOKENS, "cpu", 4)
        for elements in (_tiled_head.FORWARD_ELEMENTS, _tiled_head.BACKWARD_ELEMENTS):
            monkeypatch.setitem(elements, "cpu", 128)
        monkeypatch.setitem(_tiled_head.KEPT_BYTES, "cpu", 0)
    leaves = [torch.randn(2, 6, 8), torch.randn(67, 8), torch.randn(67)]
    ids, mask = torch.randint(67, (2, 6, 3)), torch.rand(2, 6) < 0.7 if masked else None
    ids[0, 0] = 66
    upstream, of_entropy = torch.randn(2, 6, 3), torch.randn(2, 6)
    exact = [each.double().requires_grad_() for each in leaves]
    logits = 9.0 * torch.tanh((exact[0] @ exact[1].T + exact[2]) / 9.0) / 1.3
    log_p = logits.log_softmax(-1)
    keep = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask
    want = log_p.gather(-1, ids).where(keep.unsqueeze(-1), 0.0)
    want_entropy = -(log_p.exp() * log_p).sum(-1).where(keep, 0.0)
    ((want * upstream).sum() + (want_entropy * of_entropy).sum()).backward()
    got = [each.clone().requires_grad_() for each in leaves]
    logp, entropy = pk.linear_log_probs(
        got[0], got[1], ids, bias=got[2], mask=mask, temperature=1.3, softcap=9.0, with_entropy=True
    )
    assert_close("logp", logp, want.detach(), extent=9.0)
    assert_close("golden", entropy, want_entropy.detach())
    ((logp * upstream).sum() + (entropy * of_entropy).sum()).backward()
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("logits_dtype", ["float32", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_ids_of_a_16_bit_head(backend, dtype, logits_dtype):
    """Of logits that are or are not rounded; the first id with the bits that it has alone."""
    # Logits are multiples of 1/64 of at most 2^7, exact in float32: every backend rounds the same ones.
    hidden, weight = (torch.randint(-4, 5, shape).to(dtype) / 2 for shape in ((9, 16), (70, 16)))
    bias = torch.randint(-4, 5, (70,)).to(dtype) / 64
    ids, options = torch.randint(70, (9, 3)), {"bias": bias, "logits_dtype": logits_dtype, "temperature": 1.6}
    z = hidden.double() @ weight.double().T + bias.double()
    z = z.to(dtype).double() if logits_dtype == "input" else z
    assert (z != z.to(torch.bfloat16)).any() == (logits_dtype == "float32" or dtype != torch.bfloat16)
    leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
    logp, entropy = pk.linear_log_probs(*leaves, ids, with_entropy=True, **options)
    want = (z / 1.6).log_softmax(-1)
    assert_close("logp", logp, want.gather(1, ids), extent=40.0)
    alone, entropy_alone = pk.linear_log_probs(hidden, weight, ids[:, 0], with_entropy=True, **options)
    assert torch.equal(logp[:, 0].detach(), alone) and torch.equal(entropy.detach(), entropy_alone)
    upstream = torch.randn(9, 3)
    (logp * upstream).sum().backward()
    slope = torch.zeros_like(want).scatter_add_(1, ids, upstream.double())
    slope = (slope - upstream.double().sum(1, keepdim=True) * want.exp()) / 1.6
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-5}
    for leaf, exact in zip(leaves, (slope @ weight.double(), slope.T @ hidden.double()), strict=True):
        torch.testing.assert_close(leaf.grad.double(), exact, **tolerance)


@pytest.mark.parametrize("linear", [False, True])
def test_what_several_ids_cannot_have(linear):
    def call(ids, **options):
        if linear:
            return pk.linear_log_probs(torch.zeros(5, 3), torch.zeros(7, 3), ids, **options)
        return pk.log_probs(torch.zeros(5, 7), ids, **options)

    with pytest.raises(ValueError, match=r"ids: expected shape \[5, 2\] as of the leading dimensions"):
        call(torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids: expected shape \[..., K\] with K of at least 1"):
        call(torch.zeros(5, 0, dtype=torch.int64))
    with pytest.raises(IndexError, match=r"ids: expected labels in \[0, 7\), got 7 at \[3, 1\]"):
        call(torch.zeros(5, 2, dtype=torch.int64).index_put((torch.tensor(3), torch.tensor(1)), torch.tensor(7)))
    with pytest.raises(ValueError, match=r"mask: expected shape \[5\]"):
        call(torch.zeros(5, 2, dtype=torch.int64), mask=torch.ones(5, 2, dtype=torch.bool))
    if not linear:
        with pytest.raises(ValueError, match="inplace_backward: expected False with ids"):
            call(torch.zeros(5, 2, dtype=torch.int64), inplace_backward=True)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"min_prob": 0.0}, ValueError, r"min_prob: expected a finite number in \[0.001, 1\], got 0.0"),
        ({"min_prob": "1"}, TypeError, "min_prob: expected a number, got str"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"mask: expected shape \[5\]"),
        ({"ids": torch.full((5,), 7)}, IndexError, r"ids: expected labels in \[0, 7\)"),
        ({"ids": torch.zeros(5, 2, dtype=torch.int64)}, ValueError, r"ids: expected shape \[5\]"),
    ],
)
@pytest.mark.parametrize(
    "scored", [torch.zeros(5, 7), pk.Head(torch.zeros(5, 3), torch.zeros(7, 3))], ids=["z", "head"]
)
def test_errors(scored, changes, error, message):
    with pytest.raises(error, match=message):
        pk.candidates(scored, **changes)


def test_errors_of_one_form():
    with pytest.raises(ValueError, match='logits_dtype: expected "float32" with logits'):
        pk.candidates(torch.zeros(5, 7), logits_dtype="input")
    with pytest.raises(ValueError, match='logits_dtype: expected "float32" or "input"'):
        pk.candidates(pk.Head(torch.zeros(5, 3), torch.zeros(7, 3)), logits_dtype="half")
    with pytest.raises(ValueError, match="softcap: expected None beside a Head"):
        pk.candidates(pk.Head(torch.zeros(5, 3), torch.zeros(7, 3)), softcap=3.0)
    with pytest.raises(TypeError, match="logits: expected a tensor"):
        pk.candidates([1.0])


# --- the loss ---


@given(
    rows=st.integers(0, 6),
    width=st.integers(1, 5),
    clip=st.sampled_from([(0.2, 0.2), (0.2, 0.28), (1.0, 3.0)]),
    masked=st.booleans(),
    weighted=st.booleans(),
    denominator=st.sampled_from([None, 7.0]),
    seed=seeds,
)
def test_loss_matches_loop(rows, width, clip, masked, weighted, denominator, seed):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(rows, width + 3, generator=generator).log_softmax(-1)[:, :width].contiguous()
    logp = (old + 0.4 * torch.randn(rows, width, generator=generator)).requires_grad_()
    advantages = torch.randn(rows, width, generator=generator)
    there = torch.rand(rows, width, generator=generator) < 0.7
    old[~there], advantages[~there] = -math.inf, math.nan
    mask = torch.rand(rows, generator=generator) < 0.7 if masked else None
    weights = torch.rand(rows, generator=generator) if weighted else None
    options = {"clip_low": clip[0], "clip_high": clip[1], "denominator": denominator}
    result = pk.distribution_ppo_loss(logp, old, advantages, mask=mask, weights=weights, **options)
    positions = [t for t in range(rows) if mask is None or mask[t]]
    loss, gradient, clipped, count = 0.0, torch.zeros(rows, width, dtype=torch.float64), 0, 0
    by = denominator or max(len(positions), 1)
    for t in positions:
        for v in range(width):
            if not there[t, v]:
                continue
            p, a = math.exp(float(old[t, v])) * (float(weights[t]) if weighted else 1.0), float(advantages[t, v])
            rho = math.exp(float(logp[t, v].detach() - old[t, v]))
            held = min(max(rho, 1.0 - clip[0]), 1.0 + clip[1])
            count += 1
            if -a * held > -a * rho:
                loss, clipped = loss - p * a * held / by, clipped + 1
            else:
                loss -= p * a * rho / by
                gradient[t, v] = -p * a * rho / by
    result.loss.backward()
    assert_close("golden", result.loss, loss)
    assert_close("golden", result.clip_fraction, clipped / max(count, 1))
    assert_close("grad.float32", logp.grad, gradient)


def test_gradient_of_the_policy_over_its_candidates():
    """From hidden states to candidates to loss: the sampled token and all candidates in one pass of the policy."""
    hidden, weight = torch.randn(7, 8), torch.randn(50, 8)
    ids, advantages = torch.randint(50, (7,)), torch.randn(7, 10)
    old = pk.candidates(pk.Head(hidden, weight), ids)
    leaf = weight.clone().requires_grad_()
    logp = pk.linear_log_probs(hidden, leaf, torch.cat([ids.unsqueeze(1), old.ids], 1))
    pk.distribution_ppo_loss(logp[:, 1:], old.logp, advantages).loss.backward()
    exact = weight.double().requires_grad_()
    log_p = (hidden.double() @ exact.T).log_softmax(-1).gather(1, old.ids)
    there = torch.arange(10) < old.counts.unsqueeze(1)
    # At the old policy every ratio is 1, and d (p rho) / d theta = p d logp / d theta.
    (-(old.logp.double().exp() * advantages * log_p).where(there, 0.0).sum() / 7).backward()
    assert exact.grad.any()
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(logp[:, 0].detach(), pk.linear_log_probs(hidden, weight, ids))


def test_errors_of_the_loss():
    x = torch.zeros(3, 2)
    for changes, error, message in (
        ({"logp": torch.zeros(())}, ValueError, r"logp: expected shape \[..., K\]"),
        ({"old_logp": torch.zeros(3)}, ValueError, r"old_logp: expected shape \[3, 2\] as of logp"),
        ({"advantages": torch.zeros(2)}, ValueError, r"advantages: expected shape \[3, 2\] as of logp"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ValueError, r"mask: expected shape \[3\] as of the leading"),
        ({"weights": torch.ones(3, 2)}, ValueError, r"weights: expected shape \[3\] as of the leading"),
        ({"mask": torch.ones(3)}, TypeError, "mask: expected dtype bool"),
        ({"clip_low": 2.0}, ValueError, "clip_low: expected a finite number"),
        ({"denominator": 0.0}, ValueError, "denominator: expected a finite number"),
    ):
        with pytest.raises(error, match=message):
            pk.distribution_ppo_loss(**({"logp": x, "old_logp": x, "advantages": x} | changes))


@pytest.mark.parametrize("linear", [False, True])
def test_several_ids_are_plain_pytorch_in_a_graph(linear):
    logits, ids = torch.randn(4, 30), torch.randint(30, (4, 3))
    hidden, weight = torch.randn(4, 5), torch.randn(30, 5)

    def call(leaf):
        return pk.linear_log_probs(leaf, weight, ids) if linear else pk.log_probs(leaf, ids)

    leaf = (hidden if linear else logits).requires_grad_()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [call(leaf), compiled(leaf)]
    gradients = [torch.autograd.grad((each * torch.arange(3.0)).sum(), leaf)[0] for each in results]
    assert_close("logp", results[1], results[0].detach(), extent=8.0)
    torch.testing.assert_close(*gradients)


def test_several_ids_and_a_shared_head():
    """Refused, not computed for one shard alone."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ids = torch.zeros(4, 2, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"ids: expected shape \[4\] with process_group, got \[4, 2\]"):
            pk.linear_log_probs(torch.zeros(4, 3), torch.zeros(9, 3), ids, process_group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("masked", [False, True])
def test_caps_of_logits(masked):
    """Candidates, log-probs and gradients of softcap * tanh(z / softcap)."""
    logits, ids = near(6, 130, 9.0), torch.randint(130, (6, 3))
    mask = torch.tensor([True, False, True, True, False, True]) if masked else None
    exact = logits.double().requires_grad_()
    capped = 7.0 * torch.tanh(exact / 7.0)
    got = pk.candidates(logits, ids[:, 0], min_prob=0.03, mask=mask, temperature=0.9, softcap=7.0)
    rows = loop(capped.detach(), 0.03, 0.9)
    assert_candidates(got, [row if mask is None or mask[n] else [] for n, row in enumerate(rows)], 0.03, extent=16.0)
    upstream = torch.randn(6, 3)
    keep = torch.ones(6, 1, dtype=torch.bool) if mask is None else mask.unsqueeze(1)
    want = (capped / 0.9).log_softmax(-1).gather(1, ids).where(keep, 0.0)
    (want * upstream).sum().backward()
    leaf = logits.clone().requires_grad_()
    logp = pk.log_probs(leaf, ids, mask=mask, temperature=0.9, softcap=7.0)
    (logp * upstream).sum().backward()
    assert_close("logp", logp, want.detach(), extent=16.0)
    assert torch.equal(got.token_logp, logp[:, 0].detach())
    assert_close("grad.float32", leaf.grad, exact.grad)
