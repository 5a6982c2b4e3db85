"""The C++ kernels against float64: the error must not exceed that of eager float32 plus a small tolerance."""

import math

import pytest
import torch

from prime_kernels._backends import RowGradient

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Around vector widths, the block of 1024 columns and the vocabulary of a real model.
SHAPES = [(5, 1), (3, 2), (7, 127), (4, 128), (4, 129), (3, 1023), (3, 1024), (5, 1025), (3, 4095), (2, 4097)]
BIG = (2, 151936)
# The last rounding of the result itself, per dtype of the gradient.
ROUNDING = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-10}
TOLERANCE = 5e-7


def formula(logits, ids, temperature):
    """(logp, lse, entropy) in the dtype of ``logits``."""
    z = logits / temperature
    log_p = z.log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    return log_p.gather(-1, ids[:, None])[:, 0], z.logsumexp(-1), entropy


def gradient(logits, ids, temperature, grad_logp, grad_entropy):
    leaf = logits.detach().clone().requires_grad_()
    logp, _, entropy = formula(leaf, ids, temperature)
    (logp * grad_logp + entropy * grad_entropy).sum().backward()
    return leaf.grad


def forward(rows, logits, ids, mask, temperature, with_entropy):
    """(logp, lse, entropy or None) of one model."""
    columns = rows.token_log_probs([logits], ids, mask, [temperature], with_entropy)
    return tuple(None if column is None else column[0] for column in columns)


def backward(rows, logits, ids, mask, lse, entropy, grad_logp, grad_entropy, temperature, out):
    rows.logits_gradient(logits, ids, mask, RowGradient(lse, entropy, grad_logp, grad_entropy), temperature, out)


def make(shape, dtype, scale=4.0):
    rows, columns = shape
    return (torch.randn(rows, columns) * scale).to(dtype), torch.randint(0, columns, (rows,))


def assert_close(got, exact, eager, what):
    """Relative to magnitude beyond 1, as float32 is."""
    unit = exact.abs().clamp(min=1.0)
    error, allowed = ((got.double() - exact) / unit).abs().max(), ((eager.double() - exact) / unit).abs().max()
    assert error <= allowed + TOLERANCE, f"{what}: error {error:.3g}, eager float32 has {allowed:.3g}"


def assert_gradient_close(out, exact, eager, lse, entropy, grad_logp, grad_entropy, temperature):
    """Beyond eager's error and the last rounding, allow what a float32 lse costs: half its last bit in every log p."""
    half_bit = torch.exp2(lse.abs().clamp(min=1.0).log2().ceil() - 24)
    sensitivity = (grad_logp.abs() + grad_entropy.abs() * (1.0 + entropy)) / temperature
    allowed = (eager.double() - exact).abs().max() + TOLERANCE + (half_bit * sensitivity).unsqueeze(1)
    excess = (out.double() - exact).abs() - allowed - ROUNDING[out.dtype] * exact.abs()
    assert bool((excess <= 0).all()), f"error exceeds the allowance of {allowed.max():.3g} by {excess.max():.3g}"


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, BIG], ids=str)
def test_forward(rows, shape, dtype, temperature):
    logits, ids = make(shape, dtype)
    got = forward(rows, logits, ids, None, temperature, True)
    exact, eager = formula(logits.double(), ids, temperature), formula(logits.float(), ids, temperature)
    for name, value, truth, rival in zip(("logp", "lse", "entropy"), got, exact, eager, strict=True):
        assert value.dtype == torch.float32
        assert_close(value, truth, rival, name)
    logp, lse, entropy = forward(rows, logits, ids, None, temperature, False)
    assert entropy is None
    # Another loop sums here, in another order.
    torch.testing.assert_close(logp, got[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse, got[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, BIG], ids=str)
def test_backward(rows, shape, dtype, temperature):
    logits, ids = make(shape, dtype)
    grad_logp, grad_entropy = torch.randn(shape[0]), torch.randn(shape[0])
    _, lse, entropy = forward(rows, logits, ids, None, temperature, True)
    for grads in ((grad_logp, None), (None, grad_entropy), (grad_logp, grad_entropy)):
        out = torch.full_like(logits, float("nan"))
        backward(rows, logits, ids, None, lse, entropy, *grads, temperature, out)
        dense = [torch.zeros(shape[0]) if grad is None else grad for grad in grads]
        exact = gradient(logits.double(), ids, temperature, *(grad.double() for grad in dense))
        eager = gradient(logits.float(), ids, temperature, *dense)
        assert_gradient_close(out, exact, eager, lse, entropy, *dense, temperature)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_rows_keep_their_digits(rows, dtype):
    logits, ids = make((6, 3000), dtype, scale=0.5)
    logits[torch.arange(6), ids] = torch.tensor([5.0, 10.0, 15.0, 20.0, 25.0, 40.0]).to(dtype)
    logp, lse, entropy = forward(rows, logits, ids, None, 1.0, True)
    exact = formula(logits.double(), ids, 1.0)
    # log p near 0 is right to seven digits, where eager float32 keeps none: there 1 + tail is rounded first.
    torch.testing.assert_close(logp.double(), exact[0], rtol=2e-6, atol=1e-12)
    torch.testing.assert_close(entropy.double(), exact[2], rtol=2e-6, atol=1e-12)
    ones, zeros = torch.ones(6), torch.zeros(6)
    out = torch.empty_like(logits)
    backward(rows, logits, ids, None, lse, None, ones, None, 1.0, out)
    exact_grad, eager_grad = (gradient(wide, ids, 1.0, ones, zeros) for wide in (logits.double(), logits.float()))
    assert_gradient_close(out, exact_grad, eager_grad, lse, entropy, ones, zeros, 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties(rows, dtype):
    for columns in (2, 1500, 5000):
        logits = torch.full((3, columns), 3.0, dtype=dtype)
        logits[1, columns // 2 :] = -20.0
        logits[2, : columns // 2] = -math.inf
        logp, lse, entropy = forward(rows, logits, torch.full((3,), columns - 1), None, 1.0, True)
        exact = formula(logits.double(), torch.full((3,), columns - 1), 1.0)
        for got, want in zip((logp, lse, entropy), exact, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("height", [80.0, 100.0, 200.0, 1e4])
def test_a_peak_far_above_everything_before_it(rows, height):
    """Neither the target nor the start of the row hints at the maximum, as where tokens are forbidden by -1e4."""
    for columns, peak in ((300, 250), (9000, 5000), (9000, 8999)):
        logits, ids = torch.full((2, columns), -height), torch.tensor([3, peak])
        logits[:, peak] = 0.0
        exact = formula(logits.double(), ids, 1.0)
        for with_entropy in (False, True):
            found = forward(rows, logits, ids, None, 1.0, with_entropy)
            for got, want in zip(found, exact, strict=False):
                if got is not None:
                    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(rows, dtype):
    wide = (torch.randn(6, 2051) * 3).to(dtype)
    ids = torch.randint(0, 2048, (3,))
    for view in (wide[:3, :-1], wide[::2, 1:2050], wide[:1, 3:].expand(3, -1)):
        dense = view.contiguous()
        assert view.stride() != dense.stride()
        for got, want in zip(
            forward(rows, view, ids, None, 1.0, True),
            forward(rows, dense, ids, None, 1.0, True),
            strict=True,
        ):
            assert torch.equal(got, want)
    # A gradient with its own row stride leaves the columns beside it alone.
    view, frame = wide[::2, 1:2050], torch.full((3, 2060), 7.0, dtype=dtype)
    _, lse, _ = forward(rows, view, ids, None, 1.0, False)
    want = torch.empty_like(view, memory_format=torch.contiguous_format)
    grad = torch.randn(3)
    backward(rows, view, ids, None, lse, None, grad, None, 1.0, want)
    backward(rows, view, ids, None, lse, None, grad, None, 1.0, frame[:, 5 : 5 + view.shape[1]])
    assert torch.equal(frame[:, 5 : 5 + view.shape[1]], want)
    assert bool((frame[:, :5] == 7).all()) and bool((frame[:, 5 + view.shape[1] :] == 7).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_minus_infinity(rows, dtype):
    logits, ids = make((4, 5000), dtype)
    logits[0, :1024] = -math.inf  # the first block
    logits[1, :4096] = -math.inf
    logits[2, 1024:] = -math.inf  # all but the first
    logits[3, ::2] = -math.inf
    ids = torch.tensor([4500, 4999, 17, 2001])
    got = forward(rows, logits, ids, None, 0.7, True)
    exact, eager = formula(logits.double(), ids, 0.7), formula(logits.float(), ids, 0.7)
    for name, value, truth, rival in zip(("logp", "lse", "entropy"), got, exact, eager, strict=True):
        assert_close(value, truth, rival, name)
    grads = torch.randn(4), torch.randn(4)
    out = torch.empty_like(logits)
    backward(rows, logits, ids, None, got[1], got[2], *grads, 0.7, out)
    exact_grad, eager_grad = (gradient(wide, ids, 0.7, *grads) for wide in (logits.double(), logits.float()))
    assert bool((out[logits == -math.inf] == 0).all())
    assert_gradient_close(out, exact_grad, eager_grad, got[1], got[2], *grads, 0.7)
    # The target itself may be impossible.
    ids = torch.zeros(4, dtype=torch.int64)
    logp, lse, entropy = forward(rows, logits, ids, None, 1.0, True)
    assert logp[0] == -math.inf and logp[3] == -math.inf and bool(torch.isfinite(entropy).all())
    backward(rows, logits, ids, None, lse, entropy, *grads, 1.0, out)
    exact_grad, eager_grad = (gradient(wide, ids, 1.0, *grads) for wide in (logits.double(), logits.float()))
    assert_gradient_close(out, exact_grad, eager_grad, lse, entropy, *grads, 1.0)


def test_rows_without_a_distribution_match_eager(rows):
    logits, ids = make((5, 2100), torch.float32)
    logits[0] = -math.inf
    logits[1, 2000] = math.nan
    logits[2, 5] = math.inf
    logits[3, :1500], logits[3, 1400] = -math.inf, math.nan
    logp, lse, entropy = forward(rows, logits, ids, None, 1.0, True)
    eager = formula(logits, ids, 1.0)[0]
    assert torch.equal(logp.isnan(), eager.isnan()) and logp.isnan().tolist() == [True, True, True, True, False]
    assert lse[0] == -math.inf and bool(lse[[1, 3]].isnan().all())
    assert entropy.isnan().tolist() == [True, True, True, True, False]
    out = torch.empty_like(logits)
    # A zero upstream gradient must not hide the broken rows either.
    backward(rows, logits, ids, None, lse, None, torch.zeros(5), None, 1.0, out)
    assert out.isnan().any(-1).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_rows_are_not_read(rows, dtype):
    logits, ids = make((9, 1500), dtype)
    mask = torch.rand(9) < 0.5
    mask[0], mask[1] = True, False
    clean = [part[mask] for part in forward(rows, logits, ids, None, 1.0, True)]
    grads = torch.randn(9), torch.randn(9)
    _, lse, entropy = forward(rows, logits, ids, None, 1.0, True)
    clean_grad = torch.empty_like(logits)
    backward(rows, logits, ids, None, lse, entropy, *grads, 1.0, clean_grad)

    logits[~mask] = math.nan
    ids[~mask] = torch.tensor([2**62, -1, -100])[torch.randint(0, 3, (int((~mask).sum()),))]
    parts = forward(rows, logits, ids, mask, 1.0, True)
    for got, want in zip(parts, clean, strict=True):
        assert torch.equal(got[mask], want) and bool((got[~mask] == 0).all())
    out = torch.full_like(logits, 3.0)
    backward(rows, logits, ids, mask, *parts[1:], *grads, 1.0, out)
    assert torch.equal(out[mask], clean_grad[mask]) and bool((out[~mask] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place(rows, dtype):
    logits, ids = make((5, 3001), dtype)
    grads = torch.randn(5), torch.randn(5)
    _, lse, entropy = forward(rows, logits, ids, None, 0.8, True)
    out = torch.empty_like(logits)
    backward(rows, logits, ids, None, lse, entropy, *grads, 0.8, out)
    backward(rows, logits, ids, None, lse, entropy, *grads, 0.8, logits)
    assert torch.equal(out, logits)


def test_thread_count_does_not_change_a_bit(rows):
    logits, ids = make((37, 5003), torch.bfloat16)
    mask, grads = torch.rand(37) < 0.7, (torch.randn(37), torch.randn(37))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = forward(rows, logits, ids, mask, 0.9, True)
            out = torch.empty_like(logits)
            backward(rows, logits, ids, mask, *parts[1:], *grads, 0.9, out)
            results.append((*parts, out))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_id_out_of_range_raises(rows, bad):
    logits, ids = make((6, 50), torch.float32)
    ids[4] = bad
    message = rf"ids\[4\] is {bad}, expected a value in \[0, 50\)"
    with pytest.raises(IndexError, match=message):
        forward(rows, logits, ids, None, 1.0, False)
    with pytest.raises(IndexError, match=message):
        backward(rows, logits, ids, None, torch.zeros(6), None, torch.ones(6), None, 1.0, torch.empty_like(logits))


def test_no_rows(rows):
    logits, ids = torch.empty(0, 7), torch.empty(0, dtype=torch.int64)
    parts = forward(rows, logits, ids, None, 1.0, True)
    assert [part.shape for part in parts] == [(0,)] * 3
    backward(rows, logits, ids, None, *parts[1:], parts[0], parts[0], 1.0, torch.empty_like(logits))


def test_every_16_bit_value_survives_the_conversions(rows):
    """One-column rows: lse is the logit itself, and gradients in place are rounded as torch rounds."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        logits = bits.view(dtype)
        logits = logits[torch.isfinite(logits)].unsqueeze(1)
        ids = torch.zeros(len(logits), dtype=torch.int64)
        _, lse, _ = forward(rows, logits, ids, None, 1.0, False)
        assert torch.equal(lse, logits[:, 0].float())


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_gradient_rounds_to_nearest_even(rows, dtype):
    # p = 1/2 in both columns, so the gradient of column 1 is exactly -grad / 2.
    grads = torch.randn(20000) * 10.0 ** torch.randint(-8, 4, (20000,))
    ties = 1.0 + torch.arange(64) * 2.0**-12
    grads = torch.cat([grads, ties * 2, ties * 2.0**-14, torch.tensor([65504.0 * 2, 65519.0 * 2, 65520.0 * 2, 1e6])])
    logits, ids = torch.zeros(len(grads), 2, dtype=dtype), torch.zeros(len(grads), dtype=torch.int64)
    lse = torch.full((len(grads),), math.log(2.0))
    out = torch.empty_like(logits)
    wide = torch.empty(len(grads), 2)
    backward(rows, logits, ids, None, lse, None, grads, None, 1.0, out)
    backward(rows, logits.float(), ids, None, lse, None, grads, None, 1.0, wide)
    assert torch.equal(out, wide.to(dtype))
