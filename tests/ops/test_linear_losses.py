"""linear_nll and linear_ppo_loss: the numbers and gradients of the functions that they stand for."""

import pytest
import torch
from helpers.support import assert_close

import prime_kernels as pk
from prime_kernels.ops import _tiled_head

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS, WIDTH, VOCABULARY = 9, 6, 13


@pytest.fixture(params=[1, 4, 1000, None], ids="rows={}".format)
def rows_a_tile(request, monkeypatch):
    """In bytes of float32. None: the kernels that CPUs have instead of tiles."""
    if request.param is None:
        return
    monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    monkeypatch.setattr(_tiled_head, "FUSED_BYTES", 4 * request.param * VOCABULARY)


def inputs(dtype=torch.float32, masked=True):
    leaves = [torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    mask = torch.arange(TOKENS) % 4 != 1 if masked else None
    ids = torch.randint(VOCABULARY, (TOKENS,))
    return leaves, ids if mask is None else ids.where(mask, -100), mask


def double_logp(leaves, ids, mask, temperature):
    hidden, weight, bias = (leaf.double() for leaf in leaves)
    log_p = ((hidden @ weight.T + bias) / temperature).log_softmax(-1)
    return log_p[torch.arange(TOKENS), ids if mask is None else ids.where(mask, 0)]


def with_gradients(loss, leaves, upstream=1.0):
    return [loss.detach(), *torch.autograd.grad(loss * upstream, leaves)]


# As a share of the largest value, with the logits that the kernels themselves round.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def exact_rounding(leaves, dtype, temperature=1.0):
    """How far 16 bits go from exact numbers: logits are rounded before their softmax, as in the model itself (half a
    place of two logits a log-probability), then their gradient is, then the result."""
    if dtype == torch.float32:
        return ROUNDING[dtype]
    hidden, weight, bias = (leaf.detach().double() for leaf in leaves)
    largest = (hidden @ weight.T + bias).abs().max().item() / temperature
    return torch.finfo(dtype).eps * (largest + 2)


def compare(got, want, share):
    for mine, exact in zip(got, want, strict=True):
        exact = exact.detach().double()
        # A loss is a sum of terms of either sign.
        allowed = share * max(1.0 if exact.ndim == 0 else 1e-3, exact.abs().max().item())
        torch.testing.assert_close(mine.double(), exact, rtol=0.0, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_nll(backend, rows_a_tile, dtype, masked, weighted):
    leaves, ids, mask = inputs(dtype, masked)
    weights = torch.rand(TOKENS) if weighted else None
    loss = pk.linear_nll(*leaves[:2], ids, bias=leaves[2], mask=mask, weights=weights, temperature=0.7, backend=backend)
    keep = torch.ones(TOKENS, dtype=torch.bool) if mask is None else mask
    factors = (torch.ones(TOKENS) if weights is None else weights).double()
    want = -(double_logp(leaves, ids, mask, 0.7) * factors)[keep].sum() / keep.sum()
    assert loss.dtype == torch.float32 and loss.shape == ()
    compare(with_gradients(loss, leaves, 3.0), with_gradients(want, leaves, 3.0), exact_rounding(leaves, dtype, 0.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("denominator", [None, 20.0, torch.tensor(5)], ids=str)
def test_ppo_loss(backend, rows_a_tile, dtype, denominator):
    # Between the ratios of the two largest log-ratios below.
    dual_clip = 2.4 if denominator == 20.0 else None
    leaves, ids, mask = inputs(dtype)
    truth = double_logp(leaves, ids, mask, 1.0)
    # Log-ratios inside the clip range (-0.11 to 0.26) and beyond it on either side, none of them so near a limit that
    # 16-bit logits could carry it over.
    log_ratio = torch.tensor([-0.9, -0.4, 0.04, 0.12, 0.6, 1.2])[torch.randint(6, (TOKENS,))]
    old_logp = (truth.detach() - log_ratio).float()
    advantages, weights = torch.randn(TOKENS), torch.rand(TOKENS)
    options = {"mask": mask, "weights": weights, "clip_low": 0.1, "clip_high": 0.3, "dual_clip": dual_clip,
               "denominator": denominator}  # fmt: skip
    got = pk.linear_ppo_loss(*leaves[:2], ids, old_logp, advantages, bias=leaves[2], backend=backend, **options)
    want = pk.ppo_loss(truth, old_logp, advantages, **options)
    assert not got.clip_fraction.requires_grad and not got.approx_kl.requires_grad
    mine = with_gradients(got.loss, leaves)
    compare(mine, with_gradients(want.loss, leaves), exact_rounding(leaves, dtype))
    # The composition, with the logits that the kernels themselves round: to the last bits.
    logp = pk.linear_log_probs(*leaves[:2], ids, bias=leaves[2], mask=mask, backend=backend)
    same = pk.ppo_loss(logp, old_logp, advantages, **options)
    for fused, composed in zip(got, same, strict=True):
        torch.testing.assert_close(fused, composed, rtol=1e-5, atol=1e-6)
    compare(mine, with_gradients(same.loss, leaves), ROUNDING[dtype])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_parts(backend, rows_a_tile, frozen):
    leaves, ids, mask = inputs()
    leaves[frozen].requires_grad_(False)
    rest = [leaf for leaf in leaves if leaf.requires_grad]
    got = with_gradients(pk.linear_nll(*leaves[:2], ids, bias=leaves[2], mask=mask, backend=backend), rest)
    want = with_gradients(-double_logp(leaves, ids, mask, 1.0)[mask].mean(), rest)
    compare(got, want, ROUNDING[torch.float32])


def test_no_gradient_wanted(backend):
    leaves, ids, mask = inputs()
    with torch.no_grad():
        loss = pk.linear_nll(*leaves[:2], ids, bias=leaves[2], mask=mask, backend=backend)
    assert not loss.requires_grad
    assert_close("logp", loss, -double_logp(leaves, ids, mask, 1.0)[mask].mean().detach(), extent=4.0)


def test_nothing_valid(backend):
    leaves, _, _ = inputs()
    ids, mask = torch.full((TOKENS,), -100), torch.zeros(TOKENS, dtype=torch.bool)
    loss = pk.linear_nll(*leaves[:2], ids, mask=mask, backend=backend)
    gradients = torch.autograd.grad(loss, leaves[:2], allow_unused=True, materialize_grads=True)
    assert loss == 0 and not any(gradient.any() for gradient in gradients)
    assert pk.linear_ppo_loss(*leaves[:2], ids, torch.zeros(TOKENS), torch.ones(TOKENS), mask=mask).loss == 0


def test_leading_dimensions_and_backward_twice(backend):
    leaves, ids, mask = inputs()
    hidden = leaves[0].detach().view(3, 3, WIDTH).requires_grad_()
    loss = pk.linear_nll(hidden, leaves[1], ids.view(3, 3), mask=mask.view(3, 3), backend=backend)
    first, second = (torch.autograd.grad(loss, [hidden, leaves[1]], retain_graph=True) for _ in range(2))
    flat = pk.linear_nll(*leaves[:2], ids, mask=mask, backend=backend)
    for a, b, c in zip(first, second, torch.autograd.grad(flat, leaves[:2]), strict=True):
        assert torch.equal(a, b) and torch.equal(a.view(c.shape), c)


def test_float64_runs_on_eager():
    leaves, ids, mask = inputs(torch.float64)

    def loss(*leaves):
        return pk.linear_nll(*leaves[:2], ids, bias=leaves[2], mask=mask)

    assert loss(*leaves).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, leaves)


def test_ppo_loss_of_the_sampling_policy_itself(backend, rows_a_tile):
    """Without old log-probs every ratio is 1 and the gradient is that of the advantages."""
    leaves, ids, mask = inputs()
    advantages = torch.randn(TOKENS)
    got = pk.linear_ppo_loss(*leaves[:2], ids, None, advantages, bias=leaves[2], mask=mask, backend=backend)
    assert got.clip_fraction == 0 and got.approx_kl == 0
    truth = double_logp(leaves, ids, mask, 1.0)
    want = -(advantages.double() * (truth - truth.detach()).exp())[mask].mean()
    compare(with_gradients(got.loss, leaves), with_gradients(want, leaves), ROUNDING[torch.float32])
