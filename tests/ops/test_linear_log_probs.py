"""linear_log_probs and linear_log_ratios: equal to the product followed by log_probs, without its memory."""

import pytest
import torch
import torch.utils.checkpoint
from helpers.support import assert_close, gradient_kind, seeds
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk
from prime_kernels.ops import _tiled_head
from prime_kernels.ops import linear_log_probs as op


def set_tiles(monkeypatch, tokens, columns, kept=0):
    """Tiles of some tokens by some of the vocabulary wherever there is a size; bytes of logits that are kept.

    CPUs go by tiles too, as GPUs do: their own kernels have their tests in tests/native.
    """
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(op, "CHUNK_ELEMENTS", 11 * tokens)
    sizes = {"TOKENS": tokens, "FORWARD_ELEMENTS": tokens * columns, "BACKWARD_ELEMENTS": tokens * columns}
    for name, size in sizes.items():
        monkeypatch.setattr(_tiled_head, name, {"cpu": size, "cuda": size})
    monkeypatch.setattr(_tiled_head, "kept_bytes", lambda device_type: kept)


CHUNKS = [(1, 11), (3, 11), (1000, 11), (3, 4), (8, 1), (1, 10)]


@pytest.fixture(
    params=[*CHUNKS, (3, 11, 4096), (3, 4, 4096), ()], ids=lambda size: "x".join(map(str, size)) or "kernels"
)
def rows_a_chunk(request, monkeypatch):
    """Tiles of one row, of a few with a remainder, one for all, and parts of the vocabulary of 11 tokens; logits that
    are made again in backward, and logits that are kept. Or the kernels that CPUs have instead of tiles."""
    if request.param:
        set_tiles(monkeypatch, *request.param)


@pytest.fixture
def cpu():
    if (reason := pk.available_backends()["cpu"]) is not None:
        pytest.skip(reason)


def head(dtype=torch.float32, tokens=8, width=5, vocabulary=11, bias=True):
    leaves = [torch.randn(tokens, width), torch.randn(vocabulary, width), torch.randn(vocabulary)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    return pk.Head(*leaves[:2], leaves[2] if bias else None)


def truth(of: pk.Head, ids, mask, temperature):
    """The whole product in float64 from the same leaves, then log-probabilities and entropies."""
    z = of.hidden.double() @ of.weight.double().T + (0 if of.bias is None else of.bias.double())
    log_p = (z / temperature).log_softmax(-1)
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    logp = log_p[torch.arange(len(ids)), ids.where(keep, 0)]
    return logp.where(keep, 0.0), -(log_p.exp() * log_p).sum(-1).where(keep, 0.0)


def outcome(run, leaves, upstream):
    """[logp, entropy, gradient of each leaf] of ``run()`` with these upstream gradients."""
    results = run()
    return [
        *results,
        *torch.autograd.grad(results, leaves, [g.to(r.dtype) for g, r in zip(upstream, results, strict=True)]),
    ]


def in_the_inputs_dtype(of: pk.Head, ids, mask, temperature):
    """What a model does without this library: the product in the dtype of its tensors, softmax in float32."""
    z = torch.nn.functional.linear(of.hidden, of.weight, of.bias).float()
    log_p = (z / temperature).log_softmax(-1)
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    logp = log_p[torch.arange(len(ids)), ids.where(keep, 0)]
    return logp.where(keep, 0.0), -(log_p.exp() * log_p).sum(-1).where(keep, 0.0)


# How far the tiles may be beyond the error of the plain product, as a share of the largest value: for 16-bit gradients
# one rounding of the logits' gradient and one of the result, each half a unit in the last place, may go the other way.
BEYOND = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def assert_no_worse_than_plain(got, plain, want, dtype):
    for mine, theirs, exact in zip(got, plain, want, strict=True):
        exact, scale = exact.double(), max(1.0, exact.abs().max().item())
        error, allowed = ((x.double() - exact).abs().max().item() for x in (mine, theirs))
        assert error <= 1.5 * allowed + BEYOND[dtype] * scale, (error, allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_are_no_worse_than_the_product_in_the_inputs_dtype(cpu, rows_a_chunk, dtype, bias, masked):
    given_head, ids = head(dtype, bias=bias), torch.randint(11, (8,))
    mask = torch.tensor([True, False, True, True, False, True, True, True]) if masked else None
    if masked:
        ids[1] = -100

    def run():
        return pk.linear_log_probs(
            given_head.hidden,
            given_head.weight,
            ids,
            bias=given_head.bias,
            mask=mask,
            temperature=0.7,
            with_entropy=True,
            backend="cpu",
        )

    leaves, upstream = [leaf for leaf in given_head[:3] if leaf is not None], (torch.randn(8), torch.randn(8))
    got = outcome(run, leaves, upstream)
    plain = outcome(lambda: in_the_inputs_dtype(given_head, ids, mask, 0.7), leaves, upstream)
    want = outcome(lambda: truth(given_head, ids, mask, 0.7), leaves, upstream)
    assert got[0].dtype == got[1].dtype == torch.float32 and all(g.dtype == dtype for g in got[2:])
    assert_no_worse_than_plain(got, plain, want, dtype)
    if masked:
        assert not got[0][~mask].any() and not got[1][~mask].any() and not got[2][~mask].any()


LAYOUTS = {
    "hidden by columns": lambda h, w: (h.T.contiguous().T, w),
    "every other column of hidden": lambda h, w: (torch.stack([h, h + 1], -1).flatten(1)[:, ::2], w),
    "one hidden state for all": lambda h, w: (h[:1].expand(8, 5), w),
    "weight by columns": lambda h, w: (h, w.T.contiguous().T),
    "part of a wider weight": lambda h, w: (h, torch.cat([w, w], 1)[:, :5]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_any_layout(cpu, rows_a_chunk, layout):
    plain, ids, upstream = head(), torch.randint(11, (8,)), (torch.randn(8),)
    hidden, weight = (leaf.detach().requires_grad_() for leaf in LAYOUTS[layout](plain.hidden, plain.weight))
    got = outcome(lambda: [pk.linear_log_probs(hidden, weight, ids, backend="cpu")], [hidden, weight], upstream)
    exact = pk.Head(hidden, weight)
    want = outcome(lambda: truth(exact, ids, None, 1.0)[:1], [hidden, weight], upstream)
    for mine, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(mine.double(), wanted.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("through", ["logp", "entropy"])
def test_tiles_with_a_frozen_part_and_one_result_used(cpu, rows_a_chunk, frozen, through):
    given_head, ids, upstream = head(), torch.randint(11, (8,)), torch.randn(8)
    getattr(given_head, frozen).requires_grad_(False)
    leaves = [leaf for leaf in given_head[:3] if leaf.requires_grad]
    both = pk.linear_log_probs(
        given_head.hidden, given_head.weight, ids, bias=given_head.bias, with_entropy=True, backend="cpu"
    )
    index = ["logp", "entropy"].index(through)
    got = torch.autograd.grad(both[index], leaves, upstream)
    want = torch.autograd.grad(truth(given_head, ids, None, 1.0)[index], leaves, upstream.double())
    for mine, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


def test_tiles_never_hold_more_than_one_tile_of_logits(cpu, monkeypatch):
    """Every tensor that forward or backward makes, seen by the dispatcher: none as large as [tokens, vocabulary]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.untyped_storage().nbytes() // result.element_size())
            return result

    tokens, width, vocabulary = 64, 3, 48
    set_tiles(monkeypatch, 4, vocabulary)
    given_head = head(tokens=tokens, width=width, vocabulary=vocabulary)
    with Watch():
        logp = pk.linear_log_probs(
            given_head.hidden,
            given_head.weight,
            torch.randint(vocabulary, (tokens,)),
            bias=given_head.bias,
            backend="cpu",
        )
        logp.sum().backward()
    assert max(largest) == max(vocabulary * 4, tokens * width) and len(largest) > 2 * tokens // 4


def test_logits_are_kept_where_they_are_few_and_a_gradient_is_wanted(cpu, monkeypatch):
    """Tiles made in (forward, backward, backward again), and those of forward that stay."""
    made = []
    plain = _tiled_head.Tiles.logits
    monkeypatch.setattr(
        _tiled_head.Tiles, "logits", lambda *a: made.append(len(a) > 3 and a[3] is not None) or plain(*a)
    )
    given_head, ids = head(), torch.randint(11, (8,))

    def counts(kept):
        set_tiles(monkeypatch, 3, 4, kept)
        made.clear()
        logp = pk.linear_log_probs(*given_head[:2], ids, backend="cpu")
        stay, after = sum(made), [len(made)]
        for _ in range(2):
            logp.sum().backward(inputs=given_head[:2], retain_graph=True)
            after.append(len(made) - sum(after))
        return (*after, stay)

    everything = 4 * 8 * 11
    assert counts(everything) == (9, 0, 9, 9)
    assert counts(everything - 1) == (9, 9, 9, 0)
    with torch.no_grad():
        set_tiles(monkeypatch, 3, 4, everything)
        made.clear()
        pk.linear_log_probs(*given_head[:2], ids, backend="cpu")
        assert made == [False] * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_logits_give_the_same_bits(backend, monkeypatch, dtype):
    """A vocabulary that is no multiple of 8 in tiles that are; a gradient is wanted from one of two equal heads."""
    set_tiles(monkeypatch, 16, 30, kept=2**20)
    of = head(dtype, tokens=40, width=5, vocabulary=101)
    ids = torch.randint(101, (40,))
    ratios = pk.linear_log_ratios(of, pk.Head(*(leaf.detach() for leaf in of[:3])), ids, backend=backend)
    assert torch.equal(ratios.log_ratio, torch.zeros(40)) and ratios.prm_logp.requires_grad
    exact = truth(of, ids, None, 1.0)[0].detach().float()
    # Rounding of the logits, whose size is about that of the log-probabilities.
    atol = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(ratios.ref_logp, exact, rtol=0.0, atol=atol)


def test_a_float64_policy_runs_beside_float32_heads(cpu):
    prm, ref, policy = head(), head(), head(torch.float64)
    result = pk.linear_log_ratios(prm, ref, torch.randint(11, (8,)), policy=policy)
    assert result.policy_logp.dtype == torch.float64 and result.prm_logp.dtype == torch.float32
    with pytest.raises(TypeError, match="float64"):
        pk.linear_log_ratios(prm, ref, torch.randint(11, (8,)), policy=policy, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_whole_product(rows_a_chunk, dtype, bias, masked):
    given_head, ids = head(dtype, bias=bias), torch.randint(11, (8,))
    mask = torch.tensor([True, False, True, True, False, True, True, True]) if masked else None
    if masked:
        ids[1] = -100
    logp, entropy = pk.linear_log_probs(
        given_head.hidden,
        given_head.weight,
        ids,
        bias=given_head.bias,
        mask=mask,
        temperature=0.7,
        with_entropy=True,
        backend="eager",
    )
    expected = truth(given_head, ids, mask, 0.7)
    assert logp.dtype == entropy.dtype == torch.float32
    assert_close("logp", logp, expected[0].detach())
    assert_close("logp", entropy, expected[1].detach())
    leaves = [leaf for leaf in given_head[:3] if leaf is not None]
    upstream = torch.randn(8), torch.randn(8)
    got = torch.autograd.grad([logp, entropy], leaves, upstream)
    want = torch.autograd.grad(expected, leaves, [grad.double() for grad in upstream])
    for gradient, wanted in zip(got, want, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient_kind(dtype), gradient, wanted)


@given(tokens=st.integers(0, 6), width=st.integers(1, 4), vocabulary=st.integers(1, 9), seed=seeds)
def test_any_size(backend, tokens, width, vocabulary, seed):
    torch.manual_seed(seed)
    given_head, ids = head(tokens=tokens, width=width, vocabulary=vocabulary), torch.randint(vocabulary, (tokens,))
    logp = pk.linear_log_probs(given_head.hidden, given_head.weight, ids, bias=given_head.bias, backend=backend)
    assert_close("logp", logp, truth(given_head, ids, None, 1.0)[0].detach())
    logp.sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in given_head[:3])


def test_masked_hidden_states_are_not_read(backend, rows_a_chunk):
    given_head, mask = head(), torch.arange(8) % 2 == 0
    hidden = given_head.hidden.detach().clone()
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    logp = pk.linear_log_probs(hidden, given_head.weight, torch.arange(8).where(mask, 99), mask=mask, backend=backend)
    logp.backward(torch.randn(8))
    assert not logp[~mask].any() and not hidden.grad[~mask].any()
    assert given_head.weight.grad.isfinite().all() and hidden.grad.isfinite().all()


def test_nothing_valid(backend, rows_a_chunk):
    given_head = head()
    logp = pk.linear_log_probs(
        given_head.hidden,
        given_head.weight,
        torch.full((8,), -1),
        mask=torch.zeros(8, dtype=torch.bool),
        backend=backend,
    )
    logp.sum().backward()
    assert not logp.any() and not given_head.weight.grad.any()


def test_leading_dimensions_and_frozen_head(backend):
    hidden, weight = torch.randn(2, 3, 5, requires_grad=True), torch.randn(11, 5)
    ids = torch.randint(11, (2, 3))
    logp = pk.linear_log_probs(hidden, weight, ids, backend=backend)
    assert_close("logp", logp, (hidden @ weight.T).double().log_softmax(-1).gather(-1, ids[..., None])[..., 0].detach())
    logp.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_logits_of_all_tokens_never_exist(monkeypatch):
    set_tiles(monkeypatch, 4, 11)
    sizes = []
    plain = torch.nn.functional.linear

    def spy(*arguments):
        result = plain(*arguments)
        sizes.append(result.shape[0])
        return result

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    kept = []
    given_head = head(tokens=10)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        logp = pk.linear_log_probs(given_head.hidden, given_head.weight, torch.randint(11, (10,)), backend="eager")
    assert sizes == [4, 4, 2] and all(shape[-1:] != (11,) for shape in kept)
    logp.sum().backward()
    assert sorted(sizes) == [2, 2, 4, 4, 4, 4]


def test_gradcheck(rows_a_chunk):
    given_head, ids = head(torch.float64, tokens=4), torch.tensor([0, 10, 3, -5])
    mask = torch.tensor([True, True, True, False])

    def run(hidden, weight, bias):
        return pk.linear_log_probs(hidden, weight, ids, bias=bias, mask=mask, temperature=1.3, with_entropy=True)

    assert torch.autograd.gradcheck(run, tuple(given_head[:3]))


def test_ratio_of_equal_heads_is_exactly_zero(backend, rows_a_chunk):
    prm, ids = head(torch.bfloat16), torch.randint(11, (8,))
    ref = pk.Head(*(leaf.detach().clone() for leaf in prm[:3]))
    result = pk.linear_log_ratios(prm, ref, ids, backend=backend)
    assert torch.equal(result.log_ratio, torch.zeros(8)) and result.policy_logp is None


def test_ratios_match_the_whole_product(rows_a_chunk):
    prm, ref, policy = head(), head(width=3), head(torch.bfloat16, width=7)
    ids, mask = torch.randint(11, (8,)), torch.rand(8) < 0.7
    result = pk.linear_log_ratios(prm, ref, ids, policy=policy, mask=mask, policy_temperature=0.5, backend="eager")
    wanted = [truth(h, ids, mask, t)[0].detach() for h, t in ((prm, 1.0), (ref, 1.0), (policy, 0.5))]
    for got, want in zip(result, [wanted[0] - wanted[1], *wanted], strict=True):
        assert_close("logp", got, want)
    upstream = torch.randn(8)
    (result.log_ratio * upstream + result.policy_logp * upstream).sum().backward()
    assert all(leaf.grad is None for leaf in ref[:3])
    (expected,) = torch.autograd.grad(truth(prm, ids, mask, 1.0)[0], prm.weight, upstream.double())
    assert_close("grad.float32", prm.weight.grad, expected)
    assert all(leaf.grad is not None for leaf in policy[:3])


def test_inside_activation_checkpointing_and_backward_twice(backend, rows_a_chunk):
    """Recomputed in backward the result and the gradients are the same bits, and a kept graph gives them again."""
    given_head, ids, upstream = head(), torch.randint(11, (8,)), torch.randn(8)

    def logp(hidden, weight, bias):
        return pk.linear_log_probs(hidden, weight, ids, bias=bias, backend=backend)

    plain = logp(*given_head[:3])
    first = torch.autograd.grad(plain, given_head[:3], upstream, retain_graph=True)
    again = torch.autograd.grad(plain, given_head[:3], upstream)
    recomputed = torch.utils.checkpoint.checkpoint(logp, *given_head[:3], use_reentrant=False)
    third = torch.autograd.grad(recomputed, given_head[:3], upstream)
    assert torch.equal(plain, recomputed)
    for a, b, c in zip(first, again, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
