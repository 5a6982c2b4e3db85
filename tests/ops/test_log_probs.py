"""log_probs and log_ratios against plain loops, and the traps of softmax kernels."""

import math

import pytest
import torch
from helpers.support import assert_close, gradient_kind, seeds
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk
from prime_kernels import _backends
from prime_kernels._backends import RowGradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def loop_row(row: list[float], label: int, temperature: float) -> tuple[float, float, list[float], list[float]]:
    """(logp, entropy, d logp / d logits, d entropy / d logits) of one row."""
    z = [value / temperature for value in row]
    top = max(z)
    lse = top + math.log(sum(math.exp(value - top) for value in z))
    log_p = [value - lse for value in z]
    p = [math.exp(value) for value in log_p]
    entropy = -sum(a * b for a, b in zip(p, log_p, strict=True) if a > 0)
    d_logp = [((v == label) - a) / temperature for v, a in enumerate(p)]
    d_entropy = [-a * (b + entropy) / temperature if a > 0 else 0.0 for a, b in zip(p, log_p, strict=True)]
    return log_p[label], entropy, d_logp, d_entropy


def check_against_loop(logits, ids, mask, temperature, backend, with_entropy=True):
    """Values and gradients for random upstream gradients; logits [N, V] of any stride."""
    given_logits = logits.clone()
    # A leaf with the strides of `logits`, so that kernels see them.
    leaf = logits.detach().requires_grad_()
    result = pk.log_probs(leaf, ids, mask=mask, temperature=temperature, with_entropy=with_entropy, backend=backend)
    logp, entropy = result if with_entropy else (result, None)
    up_logp, up_entropy = torch.randn(len(ids)), torch.randn(len(ids)) if with_entropy else torch.zeros(len(ids))
    torch.autograd.backward(
        [logp, entropy] if with_entropy else [logp], [up_logp, up_entropy] if with_entropy else [up_logp]
    )
    values, entropies, gradient = [], [], []
    for n, row in enumerate(logits.tolist()):
        if mask is not None and not mask[n]:
            values.append(0.0)
            entropies.append(0.0)
            gradient.append([0.0] * len(row))
            continue
        value, h, d_logp, d_entropy = loop_row(row, int(ids[n]), temperature)
        values.append(value)
        entropies.append(h)
        a, b = up_logp[n].item(), up_entropy[n].item()
        gradient.append([a * x + b * y for x, y in zip(d_logp, d_entropy, strict=True)])
    assert logp.dtype == torch.float32 and leaf.grad.dtype == logits.dtype
    extent = max((abs(x) for x in logits.flatten().tolist() if math.isfinite(x)), default=0.0) / temperature
    assert_close("logp", logp, values, extent=extent)
    if with_entropy:
        assert entropy.dtype == torch.float32
        assert_close("logp", entropy, entropies, extent=extent)
    # Probabilities carry the rounding of the exponent, and the temperature divides them.
    largest = max((up_logp.abs() + up_entropy.abs()).tolist(), default=0.0) / temperature
    wanted = torch.tensor(gradient, dtype=torch.float64).view(logits.shape)
    assert_close(gradient_kind(logits.dtype), leaf.grad, wanted, extent=extent * largest)
    assert torch.equal(given_logits.nan_to_num(), logits.nan_to_num())


@given(
    rows=st.integers(0, 5),
    vocabulary=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    temperature=st.sampled_from([1.0, 0.3, 2.5]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    masked=st.booleans(),
    with_entropy=st.booleans(),
    seed=seeds,
)
def test_matches_loop(backend, rows, vocabulary, dtype, temperature, spread, masked, with_entropy, seed):
    torch.manual_seed(seed)
    logits = (torch.randn(rows, vocabulary) * spread).to(dtype)
    ids = torch.randint(vocabulary, (rows,))
    mask = torch.rand(rows) < 0.6 if masked else None
    check_against_loop(logits, ids, mask, temperature, backend, with_entropy)


@pytest.mark.parametrize("vocabulary", [1, 2, 15, 16, 17, 127, 128, 129, 4095, 4097, 151936])
@pytest.mark.parametrize("dtype", DTYPES)
def test_vocabularies_around_block_edges(backend, vocabulary, dtype):
    logits = (torch.randn(2, vocabulary) * 3).to(dtype)
    check_against_loop(logits, torch.tensor([0, vocabulary - 1]), None, 1.0, backend)


def test_all_logits_far_below_zero(backend):
    """A running maximum that starts at 0, or padding counted as exp(0), shows here."""
    check_against_loop(torch.randn(2, 131) - 200, torch.tensor([5, 130]), None, 1.0, backend)
    far, ids = torch.randn(2, 131) - 3e4, torch.tensor([5, 130])
    assert_close(
        "logp",
        pk.log_probs(far, ids, backend=backend),
        [loop_row(far[n].tolist(), int(ids[n]), 1.0)[0] for n in (0, 1)],
        extent=3e4,
    )


def test_peaked_rows_and_ties(backend):
    peaked = torch.zeros(3, 300)
    peaked[0, 7], peaked[1, 299] = 1e4, -1e4
    check_against_loop(peaked, torch.tensor([7, 299, 0]), None, 1.0, backend)
    check_against_loop(peaked, torch.tensor([8, 0, 299]), None, 0.5, backend)


@pytest.mark.parametrize("blocked", [slice(0, 200), slice(100, 300), slice(1, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_infinity_is_probability_zero(backend, blocked, dtype):
    logits = torch.randn(2, 300).to(dtype)
    logits[:, blocked] = -math.inf
    label = 0 if blocked.start else 250
    check_against_loop(logits, torch.tensor([label, label]), None, 1.0, backend)
    impossible = pk.log_probs(logits, torch.full((2,), blocked.start + 1), backend=backend)
    assert impossible.tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("place", ["target", "elsewhere"])
def test_a_logit_of_plus_infinity_is_nan_and_stays_in_its_row(backend, place, dtype):
    ids = torch.tensor([3, 3, 3])
    clean = torch.randn(3, 40).to(dtype)
    logits = clean.clone()
    logits[1, 3 if place == "target" else 7] = math.inf
    leaf = logits.requires_grad_()
    logp, entropy = pk.log_probs(leaf, ids, with_entropy=True, backend=backend)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    assert pk.log_probs(leaf.detach(), ids, backend=backend).isnan().tolist() == [False, True, False]
    assert pk.log_ratios(leaf, clean, ids, backend=backend).log_ratio.isnan().tolist() == [False, True, False]
    (logp + entropy).backward(torch.ones(3))
    assert leaf.grad.isnan().any(-1).tolist() == [False, True, False]


def test_a_row_of_minus_infinity_is_nan_and_stays_in_its_row(backend):
    logits = torch.zeros(2, 40)
    logits[0] = -math.inf
    logp, entropy = pk.log_probs(logits, torch.tensor([3, 3]), with_entropy=True, backend=backend)
    assert math.isnan(logp[0]) and math.isnan(entropy[0])
    assert_close("logp", torch.stack((logp[1], entropy[1])), [-math.log(40), math.log(40)])


def test_masked_rows_are_not_read(backend):
    logits = torch.randn(4, 50)
    logits[1], logits[3] = math.nan, math.inf
    ids = torch.tensor([3, -100, 49, 10**9])
    mask = torch.tensor([True, False, True, False])
    leaf = logits.clone().requires_grad_()
    logp, entropy = pk.log_probs(leaf, ids, mask=mask, with_entropy=True, backend=backend)
    (logp * torch.randn(4) + entropy * torch.randn(4)).sum().backward()
    assert logp[~mask].tolist() == [0.0, 0.0] and entropy[~mask].tolist() == [0.0, 0.0]
    assert torch.equal(leaf.grad[~mask], torch.zeros(2, 50)) and leaf.grad.isfinite().all()
    assert torch.equal(logp[mask], pk.log_probs(logits[mask], ids[mask], backend=backend))


@pytest.mark.parametrize("layout", ["sliced", "nested", "transposed", "expanded"])
def test_strided_logits(backend, layout):
    whole = torch.randn(3, 6, 21)
    leaf = whole.clone().requires_grad_()
    views = {
        "sliced": lambda x: x[0, :, 2:19],
        "nested": lambda x: x[:, :-1],
        "transposed": lambda x: x.transpose(0, 2),
        "expanded": lambda x: x[:1].expand(4, 6, 21),
    }
    view = views[layout](leaf)
    ids = torch.randint(view.shape[-1], view.shape[:-1], dtype=torch.int32)
    logp, entropy = pk.log_probs(view, ids, with_entropy=True, backend=backend)
    upstream = torch.randn(ids.shape), torch.randn(ids.shape)
    torch.autograd.backward([logp, entropy], upstream)

    plain = whole.double().requires_grad_()
    log_p = views[layout](plain).log_softmax(-1)
    expected = log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)
    torch.autograd.backward(expected, [grad.double() for grad in upstream])
    assert logp.shape == ids.shape
    assert_close("logp", logp, expected[0].detach())
    assert_close("logp", entropy, expected[1].detach())
    assert_close("grad.float32", leaf.grad, plain.grad)


def test_no_rows(backend):
    logits = torch.randn(0, 3, 7, requires_grad=True)
    logp, entropy = pk.log_probs(logits, torch.zeros(0, 3, dtype=torch.int64), with_entropy=True, backend=backend)
    (logp.sum() + entropy.sum()).backward()
    assert logp.shape == entropy.shape == (0, 3) and logits.grad.shape == logits.shape


def test_one_row_without_leading_dimensions(backend):
    logits = torch.randn(9)
    logp = pk.log_probs(logits, torch.tensor(4), backend=backend)
    assert_close("logp", logp, loop_row(logits.tolist(), 4, 1.0)[0])


def test_offsets_above_two_to_the_31(backend):
    """Only the two touched rows of this storage are ever backed by memory."""
    vocabulary, stride = 100, 2**31
    storage = torch.empty(stride + vocabulary, dtype=torch.bfloat16)
    rows = storage.as_strided((2, vocabulary), (stride, 1))
    rows.copy_(torch.randn(2, vocabulary))
    ids = torch.tensor([1, 99])
    assert torch.equal(pk.log_probs(rows, ids, backend=backend), pk.log_probs(rows.clone(), ids, backend=backend))


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_that_of_eager(backend, dtype):
    logits, ids = (torch.randn(16, 5000) * 5).to(dtype), torch.randint(5000, (16,))
    truth = pk.log_probs(logits.double(), ids, backend="eager")
    error = (pk.log_probs(logits, ids, backend=backend) - truth).abs().max()
    eager = (pk.log_probs(logits, ids, backend="eager") - truth).abs().max()
    assert error <= eager + 2e-6


def test_is_bitwise_repeatable(backend):
    logits, ids = torch.randn(8, 3000).bfloat16(), torch.randint(3000, (8,))

    def run():
        leaf = logits.clone().requires_grad_()
        logp, entropy = pk.log_probs(leaf, ids, with_entropy=True, backend=backend)
        (logp + 0.3 * entropy).sum().backward()
        return logp, entropy, leaf.grad

    first = run()
    assert all(torch.equal(a, b) for _ in range(3) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sliced", [False, True])
def test_inplace_backward_writes_over_the_logits(backend, dtype, sliced):
    leaf = torch.randn(3, 5, 33).to(dtype).requires_grad_()
    ids, mask = torch.randint(33, (3, 4 if sliced else 5)), None
    mask = torch.rand(ids.shape) < 0.7
    upstream = torch.randn(ids.shape), torch.randn(ids.shape)
    gradients, pointers = [], []
    for inplace in (False, True):
        logits = leaf * 1
        logits.register_hook(lambda grad: pointers.append(grad.data_ptr()))
        rows = logits[:, :-1] if sliced else logits
        outputs = pk.log_probs(rows, ids, mask=mask, with_entropy=True, inplace_backward=inplace, backend=backend)
        gradients.append(torch.autograd.grad(outputs, leaf, upstream)[0])
        if inplace and not sliced:
            assert pointers[-1] == logits.data_ptr() and torch.equal(logits, gradients[-1])
        if inplace and sliced:
            assert torch.equal(logits[:, :-1], gradients[-1][:, :-1])
    if backend == "eager":  # autograd one way, the formula the other
        assert_close(gradient_kind(dtype), *gradients)
    else:
        assert torch.equal(*gradients)


def test_inplace_backward_twice_raises(backend):
    logits = torch.randn(4, 9, requires_grad=True) * 1
    logp = pk.log_probs(logits, torch.zeros(4, dtype=torch.int64), inplace_backward=True, backend=backend)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"inplace_backward: .*retain_graph"):
        logp.sum().backward()


def test_inplace_backward_spoils_no_other_user_silently(backend):
    leaf, ids = torch.randn(4, 9, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    logits = leaf * 1
    other = (logits * logits).sum()
    logp = pk.log_probs(logits, ids, inplace_backward=True, backend=backend)
    logp.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_backward_twice_with_retain_graph(backend):
    logits = torch.randn(4, 9, requires_grad=True)
    logp = pk.log_probs(logits, torch.arange(4), backend=backend)
    (first,) = torch.autograd.grad(logp.sum(), logits, retain_graph=True)
    (second,) = torch.autograd.grad(logp.sum(), logits)
    assert torch.equal(first, second)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_output_alone(backend, which):
    logits, ids = torch.randn(3, 20), torch.tensor([0, 7, 19])
    leaf, upstream = logits.clone().requires_grad_(), torch.randn(3)
    outputs = pk.log_probs(leaf, ids, with_entropy=True, temperature=1.7, backend=backend)
    outputs[which].backward(upstream)
    rows = [loop_row(row, int(label), 1.7)[2 + which] for row, label in zip(logits.tolist(), ids, strict=True)]
    assert_close("grad.float32", leaf.grad, torch.tensor(rows, dtype=torch.float64) * upstream.double().unsqueeze(-1))


def test_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor([0, 5, 2, -1]), torch.tensor([True, True, True, False])

    def run(x):
        return pk.log_probs(x, ids, mask=mask, temperature=0.8, with_entropy=True)

    assert torch.autograd.gradcheck(run, (logits,))
    assert torch.autograd.gradgradcheck(run, (logits,))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_of_equal_models_is_exactly_zero(backend, dtype):
    logits, ids = (torch.randn(6, 1001) * 4).to(dtype), torch.randint(1001, (6,))
    result = pk.log_ratios(logits, logits.clone(), ids, backend=backend)
    assert torch.equal(result.log_ratio, torch.zeros(6)) and result.policy_logp is None
    strided = torch.cat((logits, logits), -1)[:, :1001]
    assert torch.equal(pk.log_ratios(logits, strided, ids, backend=backend).log_ratio, torch.zeros(6))


@given(rows=st.integers(0, 5), vocabulary=st.integers(1, 30), masked=st.booleans(), seed=seeds)
def test_ratios_match_loop(backend, rows, vocabulary, masked, seed):
    torch.manual_seed(seed)
    prm, ref, policy = (torch.randn(rows, vocabulary, requires_grad=True) for _ in range(3))
    ids, mask = torch.randint(vocabulary, (rows,)), torch.rand(rows) < 0.6 if masked else None
    result = pk.log_ratios(prm, ref, ids, policy_logits=policy, mask=mask, policy_temperature=0.6, backend=backend)
    up_ratio, up_prm, up_policy = torch.randn(3, rows)
    torch.autograd.backward([result.log_ratio, result.prm_logp, result.policy_logp], [up_ratio, up_prm, up_policy])
    assert ref.grad is None and not result.ref_logp.requires_grad
    for n in range(rows):
        if mask is not None and not mask[n]:
            assert [column[n].item() for column in result] == [0.0] * 4
            assert not prm.grad[n].any() and not policy.grad[n].any()
            continue
        models = ((prm, 1.0), (ref, 1.0), (policy, 0.6))
        by_model = [loop_row(logits[n].tolist(), int(ids[n]), temperature) for logits, temperature in models]
        logp = [row[0] for row in by_model]
        assert_close("logp", torch.stack([c[n] for c in result]), [logp[0] - logp[1], *logp])
        weight = (up_ratio[n] + up_prm[n]).item()
        assert_close("grad.float32", prm.grad[n], [weight * x for x in by_model[0][2]])
        assert_close("grad.float32", policy.grad[n], [up_policy[n].item() * x for x in by_model[2][2]])


def test_ratio_of_close_models_is_not_rounded_to_half(backend):
    """16-bit log-probabilities would make this ratio 0 or a multiple of 2^-5."""
    prm = torch.randn(4, 2000).bfloat16()
    ref, ids = prm.clone(), torch.randint(2000, (4,))
    ref[:, :50] += 0.25
    result = pk.log_ratios(prm, ref, ids, backend=backend)
    truth = pk.log_ratios(prm.double(), ref.double(), ids, backend="eager")
    assert_close("logp", result.log_ratio, truth.log_ratio)


@pytest.mark.parametrize("vocabulary", [2000, 49152])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ratio_of_nearly_equal_models(backend, dtype, vocabulary):
    """A relative difference of 1e-3, as after some steps of training: the ratio is right to 1e-5."""
    ref = torch.randn(3, vocabulary) * 4
    prm = (ref * (1 + 1e-3 * torch.randn(3, vocabulary))).to(dtype)
    ref, ids = ref.to(dtype), torch.randint(vocabulary, (3,))
    result = pk.log_ratios(prm, ref, ids, backend=backend)
    truth = pk.log_ratios(prm.double(), ref.double(), ids, backend="eager")
    assert truth.log_ratio.abs().max() > 1e-5
    assert (result.log_ratio - truth.log_ratio).abs().max() <= 1e-5


@pytest.mark.parametrize("recorded", [False, True])
def test_results_may_be_changed_in_place(backend, recorded):
    """They are tensors of their own: no view of another that autograd would not let anybody write to."""
    with torch.set_grad_enabled(recorded):
        logits = torch.randn(3, 40, requires_grad=recorded)
        ids, weight = torch.randint(40, (3,)), torch.ones(3, requires_grad=True)
        logp, entropy = pk.log_probs(logits, ids, with_entropy=True, backend=backend)
        ratios = pk.log_ratios(logits, logits.detach(), ids, policy_logits=logits, backend=backend)
    results = [logp, entropy, *ratios]
    before = [result.detach().clone() for result in results]
    for result in results:
        result.mul_(2.0 * weight)
    for result, was in zip(results, before, strict=True):
        assert torch.equal(result, 2.0 * was) and result.requires_grad


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(1, 2), (3, 129), (12, 520), (2, 1003)], ids=str)
def test_gradients_of_float32_logits_in_16_bits(backend, shape, dtype):
    """The bits of the float32 gradient after a cast, whatever the address and the row stride; the logits stay."""
    kernels, (count, columns) = _backends.rows(backend), shape
    logits, ids = torch.randn(shape) * 4, torch.randint(columns, (count,))
    logits[0, columns // 2] = 30.0
    _, lse, entropy = kernels.token_log_probs([logits], ids, None, [0.8], True).only_model()
    ids[-1] = 3 * columns  # of another part of the vocabulary
    mask, grad_logp, grad_entropy = torch.arange(count) % 4 != 2, torch.randn(count), torch.randn(count)
    grad_logp[0] = 1e6  # infinite in float16
    for gradient in (RowGradient(lse, None, grad_logp, None), RowGradient(lse, entropy, grad_logp, grad_entropy)):
        wide = torch.full(shape, math.nan)
        kernels.logits_gradient(logits, ids, mask, gradient, 0.8, wide, partial=True)
        for at in range(5):
            z, frame = torch.full((count, columns + 2 * at), math.nan), torch.full((count, columns + 13), 7.0).to(dtype)
            z = z[:, at : at + columns].copy_(logits)
            out = frame[:, at : at + columns]
            kernels.logits_gradient(z, ids, mask, gradient, 0.8, out, partial=True)
            assert torch.equal(out, wide.to(dtype)) and torch.equal(z, logits)
            assert out[mask].any(-1).all() and not out[~mask].any()
            assert (frame[:, :at] == 7.0).all() and (frame[:, at + columns :] == 7.0).all()
