"""The row kernels by themselves: small blocks, split rows, three models, strides, gradients in place."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from helpers.support import assert_close, gradient_kind

import prime_kernels as pk
from prime_kernels._backends import RowGradient
from prime_kernels._triton import rows as kernels
from prime_kernels._triton._launch_config import Config, Tuning

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks of 128 columns, so that a few hundred columns are several blocks; whole rows and rows in parts.
SPLITS = [1, 4, 16]


def small(splits):
    return Config(block=128, num_warps=1, num_stages=1, splits=splits)


def backward(logits, ids, mask, lse, entropy, grad_logp, grad_entropy, temperature, out, config=None):
    gradient = RowGradient(lse, entropy, grad_logp, grad_entropy)
    kernels.logits_gradient(logits, ids, mask, gradient, temperature, out, config=config)


def truth(logits, ids, temperature=1.0):
    """(logp, lse, entropy) in float64."""
    z = logits.double() / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return log_p.gather(-1, ids[:, None])[:, 0], z.logsumexp(-1), entropy


def gradient(logits, ids, temperature, grad_logp, grad_entropy):
    leaf = logits.double().requires_grad_()
    logp, _, entropy = truth(leaf, ids, temperature)
    (logp * grad_logp.double() + entropy * grad_entropy.double()).sum().backward()
    return leaf.grad


def make(rows, columns, dtype=torch.float32, scale=3.0):
    return (torch.randn(rows, columns) * scale).to(dtype), torch.randint(columns, (rows,))


@pytest.mark.parametrize("splits", SPLITS)
@pytest.mark.parametrize("columns", [1, 127, 128, 129, 511, 640])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_and_parts(columns, splits, dtype):
    """More parts than blocks leave some of them empty."""
    logits, ids = make(3, columns, dtype)
    got = kernels.token_log_probs([logits], ids, None, [0.7], True, small(splits))
    for value, want in zip(got, truth(logits, ids, 0.7), strict=True):
        assert_close("logp", value[0], want, extent=20.0)
    grads, out = (torch.randn(3), torch.randn(3)), torch.full_like(logits, math.nan)
    backward(logits, ids, None, got[1][0], got[2][0], *grads, 0.7, out, small(splits))
    want = gradient(logits, ids, 0.7, *grads)
    assert_close(gradient_kind(dtype), out, want, extent=20.0)
    backward(logits, ids, None, got[1][0], got[2][0], *grads, 0.7, logits, small(splits))
    assert torch.equal(out, logits)


@pytest.mark.parametrize("columns", [4095, 4097, 151936])
def test_vocabularies_of_real_size(columns):
    logits, ids = make(2, columns, torch.bfloat16)
    ids[0] = columns - 1
    got = [column[0] for column in kernels.token_log_probs([logits], ids, None, [1.0], True)]
    for value, want in zip(got, truth(logits, ids), strict=True):
        assert_close("logp", value, want)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sure_tokens_keep_their_digits(dtype, splits):
    logits, ids = make(6, 700, dtype, scale=0.5)
    logits[torch.arange(6), ids] = torch.tensor([5.0, 10.0, 15.0, 20.0, 25.0, 40.0]).to(dtype)
    got = kernels.token_log_probs([logits], ids, None, [1.0], True, small(splits))
    exact = truth(logits, ids)
    # -log p by log1p of the rest of the row: in float64, too, 1 + tail rounds away what is looked for here.
    rest = logits.double().scatter(1, ids[:, None], -math.inf).logsumexp(-1) - logits.double()[torch.arange(6), ids]
    torch.testing.assert_close(got[0][0].double(), -rest.exp().log1p(), rtol=2e-6, atol=1e-15)
    torch.testing.assert_close(got[2][0].double(), exact[2], rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("splits", [1, 4])
def test_rest_of_the_row_decides_where_the_target_is_unlikely(splits):
    """The bound: sums rounded beside a 1."""
    logits, ids = make(4, 500, scale=0.5)
    logits[torch.arange(4), ids] = -30.0
    logits[torch.arange(4), (ids + 1) % 500] = torch.tensor([5.0, 10.0, 20.0, 30.0])
    got = kernels.token_log_probs([logits], ids, None, [1.0], True, small(splits))
    for value, want in zip(got, truth(logits, ids), strict=True):
        torch.testing.assert_close(value[0].double(), want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_minus_infinity(dtype, splits):
    logits, ids = make(5, 600, dtype)
    logits[0, :128] = -math.inf  # the first block
    logits[1, :400] = -math.inf
    logits[2, 128:] = -math.inf  # all but the first
    logits[3, ::2] = -math.inf
    logits[4], logits[4, 599] = -math.inf, 2.0  # one token is left
    grads = torch.randn(5), torch.randn(5)
    for ids in (torch.tensor([599, 450, 7, 201, 599]), torch.tensor([0, 0, 599, 2, 3])):
        got = kernels.token_log_probs([logits], ids, None, [0.7], True, small(splits))
        for value, want in zip(got, truth(logits, ids, 0.7), strict=True):
            assert_close("logp", value[0], want, extent=20.0)
        out = torch.empty_like(logits)
        backward(logits, ids, None, got[1][0], got[2][0], *grads, 0.7, out, small(splits))
        want = torch.zeros(5, 600, dtype=torch.float64)
        for n in range(5):
            log_p = logits[n].double() / 0.7 - got[1][0, n].double()
            p = log_p.exp()
            curvature = torch.where(p == 0, 0.0, -p * (log_p.nan_to_num(neginf=0.0) + got[2][0, n].double()))
            want[n] = (grads[0][n] * ((torch.arange(600) == ids[n]).double() - p) + grads[1][n] * curvature) / 0.7
        assert_close(gradient_kind(dtype), out, want, extent=20.0)
        untouched = (logits == -math.inf) & (torch.arange(600) != ids[:, None])
        assert not out[untouched].any()


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_without_a_distribution(splits):
    logits, ids = make(6, 600)
    ids[:] = 300
    logits[0] = -math.inf
    logits[1, 590] = math.nan
    logits[2, 5] = math.inf
    logits[3, 300] = math.inf  # the target itself
    logits[4, 300] = math.nan
    logp, lse, entropy = (part[0] for part in kernels.token_log_probs([logits], ids, None, [1.0], True, small(splits)))
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [True] * 5 + [False]
    assert lse[0] == -math.inf and lse[5].isfinite() and not lse[:5].isfinite().any()
    out = torch.empty_like(logits)
    # A zero upstream gradient must not hide the broken rows either.
    backward(logits, ids, None, lse, None, torch.zeros(6), None, 1.0, out)
    assert out.isnan().any(-1).tolist() == [True] * 5 + [False]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_not_read(dtype, splits):
    logits, ids = make(5, 300, dtype)
    mask = torch.tensor([True, False, True, False, True])
    grads, temperature = (torch.randn(5), torch.randn(5)), 1.3
    clean = kernels.token_log_probs([logits], ids, None, [temperature], True, small(splits))
    clean_out, out = torch.empty_like(logits), torch.full_like(logits, 3.0)
    backward(logits, ids, None, clean[1][0], clean[2][0], *grads, temperature, clean_out)
    logits[~mask], ids[~mask] = math.nan, torch.tensor([2**62, -100])
    got = kernels.token_log_probs([logits], ids, mask, [temperature], True, small(splits))
    for value, want in zip(got, clean, strict=True):
        assert torch.equal(value[0][mask], want[0][mask]) and not value[0][~mask].any()
    broken = [torch.where(mask, grad, math.nan) for grad in grads]
    backward(logits, ids, mask, got[1][0], got[2][0], *broken, temperature, out)
    assert torch.equal(out[mask], clean_out[mask]) and not out[~mask].any()


@pytest.mark.parametrize("splits", [1, 4])
def test_three_models_in_one_launch(splits):
    """Each with its own stride, alignment and temperature; the same bits as one by one."""
    wide = (torch.randn(3, 4, 700) * 3).bfloat16()
    models = [wide[0, :, :600], wide[1, :, 3:603], wide[2, ::2, :600].repeat_interleave(2, 0)]
    ids, mask = torch.randint(600, (4,)), torch.tensor([True, True, False, True])
    temperatures = [1.0, 1.0, 0.6]
    logp, lse, _ = kernels.token_log_probs(models, ids, mask, temperatures, False, small(splits))
    for n, (logits, temperature) in enumerate(zip(models, temperatures, strict=True)):
        alone = kernels.token_log_probs([logits], ids, mask, [temperature], False, small(splits))
        assert torch.equal(logp[n], alone[0][0]) and torch.equal(lse[n], alone[1][0])
        assert_close("logp", logp[n], truth(logits, ids, temperature)[0].where(mask, 0.0), extent=20.0)


@pytest.mark.parametrize("columns", [127, 1000])
def test_ratios_of_sliced_padded_batches(columns):
    """logits[:, :-1], masks with garbage ids, models of different dtype, gradients of the two models that have one."""
    shape = (2, 4, columns)
    prm, policy = (torch.randn(shape).bfloat16().requires_grad_() for _ in range(2))
    ref = torch.randn(shape, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    ids = torch.randint(columns, (2, 3)).where(mask, -100)
    views = [z[:, :-1] for z in (prm, ref, policy)]
    result = pk.log_ratios(
        views[0], views[1], ids, policy_logits=views[2], mask=mask, policy_temperature=0.6, backend="triton"
    )
    upstream = [torch.randn(2, 3) for _ in range(3)]
    torch.autograd.backward([result.log_ratio, result.prm_logp, result.policy_logp], upstream)
    assert ref.grad is None and not result.ref_logp.requires_grad and not result.log_ratio[~mask].any()

    exact = [z.detach().double().requires_grad_() for z in (prm, ref, policy)]
    logp = [
        (z[:, :-1] / t).log_softmax(-1).gather(-1, ids.clamp(0)[..., None])[..., 0].where(mask, 0.0)
        for z, t in zip(exact, (1.0, 1.0, 0.6), strict=True)
    ]
    want = [logp[0] - logp[1], logp[0], logp[2]]
    torch.autograd.backward(want, [grad.double() for grad in upstream])
    for got, value in zip((result.log_ratio, result.prm_logp, result.policy_logp), want, strict=True):
        assert_close("logp", got, value.detach())
    assert_close("grad.bfloat16", prm.grad, exact[0].grad)
    assert_close("grad.bfloat16", policy.grad, exact[2].grad)


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_have_a_ratio_of_exactly_zero(dtype, splits):
    logits, ids = make(4, 601, dtype)
    shifted = torch.cat((torch.zeros(4, 3, dtype=dtype), logits), 1)[:, 3:]
    logp, _, _ = kernels.token_log_probs([logits, shifted], ids, None, [1.0, 1.0], False, small(splits))
    assert torch.equal(logp[0], logp[1])


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("columns", [5, 129, 523])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_at_any_address(dtype, columns, splits):
    """Rows that start at any element give the same bits, read nothing from beside them and write nothing there."""
    logits, ids = make(2, columns, dtype)
    grads, want = (torch.randn(2), torch.randn(2)), None
    for shift in range(16 // dtype.itemsize):
        # An odd stride: the second row starts elsewhere between two boundaries.
        wide = torch.full((2, columns + 16), math.nan, dtype=dtype)
        rows = wide[:, shift : shift + columns]
        rows.copy_(logits)
        frame = torch.full_like(wide, 7.0)
        got = kernels.token_log_probs([rows], ids, None, [0.7], True, small(splits))
        columns_of = (rows, ids, None, got[1][0], got[2][0], *grads, 0.7)
        alike, apart = frame[:, shift : shift + columns], torch.empty_like(logits)
        for out in (alike, apart):
            backward(*columns_of, out, small(splits))
        assert torch.equal(alike, apart)
        found = [*got, apart]
        if want is None:
            want = found
            for value, exact in zip(got, truth(logits, ids, 0.7), strict=True):
                assert_close("logp", value[0], exact, extent=20.0)
            assert_close(gradient_kind(dtype), apart, gradient(logits, ids, 0.7, *grads), extent=20.0)
        assert all(torch.equal(*pair) for pair in zip(found, want, strict=True))
        alike.fill_(7.0)
        assert (frame == 7.0).all()


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("columns", [2, 127, 520, 523])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradients_of_float32_logits_in_16_bits(dtype, columns, splits):
    """The bits of the float32 gradient after a cast, whatever the address and the row stride; the logits stay."""
    logits, ids = make(3, columns)
    mask, grads = torch.tensor([True, False, True]), (torch.randn(3), torch.randn(3))
    grads[0][0] = 1e6  # infinite in float16
    _, lse, entropy = (column[0] for column in kernels.token_log_probs([logits], ids, None, [0.7], True))
    ids[2] = columns + 5  # of another part of the vocabulary
    wide = torch.empty_like(logits)
    backward(logits, ids, mask, lse, entropy, *grads, 0.7, wide, small(splits))
    for stride, shift in ((columns, 0), (528, 0), (528, 1), (531, 3)):
        z = torch.full((3, stride + shift), math.nan)[:, shift : shift + columns]
        z.copy_(logits)
        frame = torch.full((3, stride + 8), 7.0, dtype=dtype)
        out = frame[:, shift : shift + columns]
        backward(z, ids, mask, lse, entropy, *grads, 0.7, out, small(splits))
        assert torch.equal(out, wide.to(dtype)) and torch.equal(z, logits) and out[0].any() and not out[1].any()
        assert (frame[:, :shift] == 7.0).all() and (frame[:, shift + columns :] == 7.0).all()


def test_results_may_be_changed_in_place():
    prm = torch.randn(3, 20, requires_grad=True)
    result = pk.log_ratios(prm, torch.randn(3, 20), torch.tensor([0, 1, 2]), backend="triton")
    result.prm_logp.mul_(2).sum().backward()
    assert prm.grad.isfinite().all()


def test_zero_gradient_rows_and_one_output_alone():
    logits, ids = make(4, 300)
    leaf, upstream = logits.clone().requires_grad_(), torch.tensor([0.0, 1.0, 0.0, -2.0])
    pk.log_probs(leaf, ids, backend="triton").backward(upstream)
    assert not leaf.grad[::2].any()
    assert_close("grad.float32", leaf.grad, gradient(logits, ids, 1.0, upstream, torch.zeros(4)))


def test_takes_cpu_tensors_only_because_it_is_interpreted():
    assert pk.available_backends()["triton"] is None
    with pytest.raises(TypeError, match=r"backend: expected float32, .*'triton', got torch.float64"):
        pk.log_probs(torch.zeros(1, 2).double(), torch.zeros(1, dtype=torch.int64), backend="triton")
    with pytest.raises(IndexError, match="ids"):
        pk.log_probs(torch.zeros(1, 2), torch.tensor([2]), backend="triton")


def test_the_search_for_a_configuration_runs():
    """bench/tune.py at a small size: rates of every candidate, whatever they are tokens_per_program here."""
    path = Path(__file__).resolve().parents[3] / "bench" / "tune.py"
    spec = importlib.util.spec_from_file_location("tune", path)
    tune = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tune)
    candidates = [Tuning(512, 64, 1), Tuning(1024, 32, 2)]
    rows = list(tune.sweep(2, 300, torch.bfloat16, torch.device("cpu"), candidates))
    assert [row["block_bytes"] for row in rows] == [512, 1024]
    assert all(row["forward"] >= 0 and row["backward"] >= 0 for row in rows)
