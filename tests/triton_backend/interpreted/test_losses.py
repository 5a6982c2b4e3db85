"""The losses by themselves, against the formulas in float64 and their gradients by autograd."""

import math

import pytest
import torch
from helpers.support import assert_close, offsets

import prime_kernels as pk
from prime_kernels._backends import ClipRange, PPOTokens, PRMBatch
from prime_kernels._constants import PRM_BALANCED_KINDS, PRM_KINDS
from prime_kernels._triton import losses as kernels
from prime_kernels._triton.segments import fill_segments, scan_segments
from prime_kernels.ops import ppo_loss

TOTAL = 67
CLIP = ClipRange(0.2, 0.28)


def tokens(spread=0.5):
    """(logp, old_logp, advantages, weights)."""
    old = -torch.rand(TOTAL)
    logp = old + spread * torch.randn(TOTAL)
    # Ratios beyond e^20, ratios that vanish, ratios of exactly 1.
    logp[:3], old[:3] = torch.tensor([25.0, -200.0, -0.7]), torch.tensor([0.0, 0.0, -0.7])
    return logp, old, torch.randn(TOTAL), torch.rand(TOTAL) * 2


def ppo_truth(columns, mask, clip, denominator):
    """(loss, clip fraction, approximate KL), gradient; the log-ratio is that of float32."""
    logp, old, advantages, weights = columns
    leaf = (logp - old).double().requires_grad_()
    weights = None if weights is None else weights.double()
    dual = None if clip.ceiling == math.inf else clip.ceiling
    given = (leaf, torch.zeros(TOTAL), advantages.double(), mask, weights)
    result = ppo_loss.reference(*given, clip.low, clip.high, dual, denominator)
    return result, torch.autograd.grad(result.loss, leaf)[0]


TENSOR = torch.tensor(3.0, dtype=torch.float64)


@pytest.mark.parametrize("weighted, denominator", [(False, None), (True, None), (False, 7.5), (True, TENSOR)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_ppo(masked, weighted, denominator, cut):
    clip = CLIP._replace(ceiling=1.5) if weighted else CLIP
    columns, mask = tokens(), torch.rand(TOTAL) < 0.6 if masked else None
    columns = (*columns[:3], columns[3] if weighted else None)
    if masked:
        mask[0] = False
    else:
        columns[2][0] = 0.0
    want, gradient = ppo_truth(columns, mask, clip, denominator)
    if masked:
        for each in columns:
            if each is not None:
                each[~mask] = math.nan
    config = cut(TOTAL)
    *got, scale = kernels.ppo_loss_and_scale(PPOTokens(*columns, mask), clip, denominator, config)
    for value, expected in zip(got, want, strict=True):
        assert value.shape == () and value.dtype == torch.float32
        assert_close("golden", value, expected.detach())
    divisor = (TOTAL if mask is None else int(mask.sum())) if denominator is None else float(denominator)
    assert_close("float64", scale, 1.0 / divisor)
    got = kernels.ppo_gradient(PPOTokens(*columns, mask), clip, scale, torch.tensor(-2.0), config)
    assert_close("grad.float32", got, -2.0 * gradient)
    if masked:
        assert (got[~mask] == 0.0).all()


def test_ppo_of_exploded_ratios(cut):
    """Held at e^20, where nothing flows back, and right to the last digits just below."""
    logp = torch.tensor([19.75, 25.0, -12.3, 20.0])
    batch = PPOTokens(logp, torch.zeros(4), torch.full((4,), -1.0), None, None)
    loss, clip_fraction, approx_kl, scale = kernels.ppo_loss_and_scale(batch, ClipRange(0.2, 0.2), 1.0, cut(4))
    assert float(loss) == pytest.approx(math.exp(19.75) + 2 * math.exp(20.0) + 0.8, rel=1e-6)
    assert float(clip_fraction) == 0.25 and float(approx_kl) == pytest.approx(-52.45 / 4, rel=1e-6)
    got = kernels.ppo_gradient(batch, ClipRange(0.2, 0.2), scale, torch.tensor(1.0), cut(4))
    assert got.tolist() == pytest.approx([math.exp(19.75), 0.0, 0.0, math.exp(20.0)], rel=1e-6)


def test_ppo_hands_on_nan(cut):
    columns = [torch.zeros(20) for _ in range(3)]
    columns[0][7] = math.nan
    loss, _, approx_kl, scale = kernels.ppo_loss_and_scale(PPOTokens(*columns, None, None), CLIP, None, cut(20))
    assert loss.isnan() and approx_kl.isnan()
    got = kernels.ppo_gradient(PPOTokens(*columns, None, None), CLIP, scale, torch.tensor(1.0), cut(20))
    assert got.isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("total", [0, 5])
def test_ppo_without_valid_tokens(total):
    columns = (*(torch.full((total,), math.nan) for _ in range(3)), None)
    mask = torch.zeros(total, dtype=torch.bool)
    *results, scale = kernels.ppo_loss_and_scale(PPOTokens(*columns, mask), CLIP, None)
    assert [float(value) for value in results] == [0.0, 0.0, 0.0] and float(scale) == 1.0
    assert kernels.ppo_gradient(PPOTokens(*columns, mask), CLIP, scale, torch.tensor(1.0)).tolist() == [0.0] * total


LENGTHS = [0, 3, 0, 17, 1, 1, 30, 0, 9, 6]
GROUPS = [1, 0, 4, 5]


def prm_check(log_ratio, outcomes, lengths, groups, kind, beta, config, weights=None, shift=None):
    cu, cu_groups = offsets(lengths), None if groups is None else offsets(groups)
    leaf = log_ratio.double().requires_grad_()
    options = {"weights": weights, "shift": shift, "margin": 0.3}
    want = pk.prm_loss(leaf, outcomes, cu, cu_groups=cu_groups, kind=kind, beta=beta, backend="eager", **options)
    batch = PRMBatch(log_ratio, outcomes, cu, cu_groups, weights, shift)
    if kind == "prefix":
        loss, accuracy, slope = kernels.prefix_loss_and_slope(batch, beta, 0.3, config)
    else:
        loss, accuracy, slope = kernels.prm_loss_and_slope(batch, kind, beta, config)
    assert loss.shape == accuracy.shape == () and loss.dtype == accuracy.dtype == torch.float32
    assert_close("golden", loss, want.loss)
    assert_close("golden", accuracy, want.pair_accuracy)
    gradient = torch.autograd.grad(want.loss, leaf)[0]
    if kind == "prefix":
        assert slope.dtype == torch.float32
        got = scan_segments(slope, cu, 1.0, True, torch.tensor(2.0), config) / 2
    else:
        assert slope.dtype == torch.float64 and (slope[torch.tensor(lengths) == 0] == 0.0).all()
        got = fill_segments(slope, cu, log_ratio.numel(), None, config)
    assert_close("grad.float32", got, gradient)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("kind", PRM_KINDS)
def test_prm(kind, soft, cut):
    log_ratio, outcomes = torch.randn(TOTAL), torch.rand(len(LENGTHS), dtype=torch.float64)
    if not soft:
        outcomes = (outcomes > 0.5).double()
    # A pair that is there in any case, and one that is tied.
    outcomes[[8, 9]] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    log_ratio[20:22] = 0.5
    for beta in (0.05, 3.0):
        prm_check(log_ratio, outcomes, LENGTHS, GROUPS, kind, beta, cut(TOTAL))


@pytest.mark.parametrize("weighted, shifted", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", PRM_BALANCED_KINDS)
def test_prm_balanced(kind, weighted, shifted, cut):
    log_ratio, (outcomes, weights, shift) = torch.randn(TOTAL), torch.rand(3, len(LENGTHS), dtype=torch.float64)
    balance = (weights if weighted else None, 4 * shift - 2 if shifted else None)
    prm_check(log_ratio, outcomes, LENGTHS, GROUPS, kind, 0.7, cut(TOTAL), *balance)


@pytest.mark.parametrize("kind", ["ce", "kto", "prefix"])
def test_prm_without_groups(kind, cut):
    log_ratio, outcomes = torch.randn(TOTAL) + 1.0, torch.rand(len(LENGTHS), dtype=torch.float64)
    prm_check(log_ratio, outcomes, LENGTHS, None, kind, 0.5, cut(TOTAL))


@pytest.mark.parametrize("kind", PRM_KINDS)
@pytest.mark.parametrize("lengths, groups", [([], []), ([0, 0], [2]), ([0], [1, 0]), ([20], [1]), ([9, 30], [1, 1])])
def test_prm_of_little(kind, lengths, groups, cut):
    log_ratio, outcomes = torch.randn(sum(lengths)), torch.ones(len(lengths), dtype=torch.float64)
    prm_check(log_ratio, outcomes, lengths, groups, kind, 0.05, cut(sum(lengths)))


@pytest.mark.parametrize("kind", ["ce", "dpo", "prefix"])
def test_prm_of_more_responses_than_a_block(kind):
    lengths, groups = [index % 3 for index in range(600)], [9] * 66 + [6]
    log_ratio, outcomes = torch.randn(sum(lengths)), (torch.rand(600) < 0.5).double()
    prm_check(log_ratio, outcomes, lengths, groups, kind, 0.5, None)


def test_prm_of_extreme_sums(cut):
    """Sure predictions, right and wrong: losses neither overflow nor lose their tails."""
    lengths, outcomes = [1, 12, 20, 5], torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    log_ratio = torch.cat([torch.full((n,), x) for n, x in zip(lengths, [900.0, -80.0, -60.0, 300.0], strict=True)])
    for kind in PRM_KINDS:
        prm_check(log_ratio, outcomes, lengths, [4], kind, 1.0, cut(sum(lengths)))


def test_prm_nan_leaves_slopes_of_others(cut):
    log_ratio, outcomes = torch.randn(TOTAL), torch.tensor([0.0, 1.0] * 5, dtype=torch.float64)
    log_ratio[-1] = math.nan
    batch = PRMBatch(log_ratio, outcomes, offsets(LENGTHS), None, None, None)
    loss, _, slope = kernels.prm_loss_and_slope(batch, "ce", 0.05, cut(TOTAL))
    assert loss.isnan() and slope.isnan().nonzero().tolist() == [[9]]
    loss, _, slope = kernels.prefix_loss_and_slope(batch, 0.05, 5.0, cut(TOTAL))
    assert loss.isnan() and slope.isnan().nonzero().tolist() == [[TOTAL - 1]]


def test_bits_do_not_change(cut):
    columns, config = tokens(), cut(TOTAL)
    first, second = (kernels.ppo_loss_and_scale(PPOTokens(*columns, None), CLIP, None, config) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    outcomes = torch.rand(10, dtype=torch.float64)
    batch = PRMBatch(columns[0], outcomes, offsets(LENGTHS), offsets(GROUPS), None, None)
    for run in (
        lambda: kernels.prm_loss_and_slope(batch, "dpo", 0.05, config),
        lambda: kernels.prefix_loss_and_slope(batch, 1.0, 0.5, config),
    ):
        assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))
