"""Importance weights and mismatch metrics against their definitions."""

import math

import pytest
import torch
from pydantic import ValidationError

from prime_trainer.config.sections import RolloutConfig
from prime_trainer.train.importance import importance


def test_weights_are_truncated_ratios_and_metrics_their_definitions():
    old, rollout = torch.tensor([-1.0, -2.0, -3.0, -0.5]), torch.tensor([-1.0, -2.5, -1.0, -2.5])
    weights, metrics = importance(old, rollout, 2.0)
    ratios = [1.0, math.exp(0.5), math.exp(-2.0), math.exp(2.0)]
    assert weights.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-2.0), 2.0])
    assert weights.dtype == torch.float32 and not weights.requires_grad
    assert metrics["mismatch"] == pytest.approx((0 + 0.5 + 2 + 2) / 4)
    assert metrics["mismatch_max"] == pytest.approx(2.0)
    assert metrics["mismatch_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in ratios) / 4)
    assert metrics["mismatch_ess"] == pytest.approx(sum(ratios) ** 2 / sum(r * r for r in ratios) / 4)
    assert metrics["tis_capped"] == 0.25


RATIOS = [1.0, 3.0, 0.5, 1.5, 1.5, 0.1, 1.9]
LENGTHS = [0, 3, 7, 7]  # of responses: products 1.5, 0.4275, and an empty one


@pytest.mark.parametrize(
    ("mode", "cap", "wanted", "masked"),
    [
        ("token_mask", 2.0, [1.0, 0.0, 0.5, 1.5, 1.5, 0.1, 1.9], {"tis_masked": 1 / 7}),
        ("token_mask", 1.2, [1.0, 0.0, 0.5, 0.0, 0.0, 0.1, 0.0], {"tis_masked": 4 / 7}),
        ("sequence_mask", 2.0, [1.5] * 3 + [0.4275] * 4, {"tis_masked": 0.0, "tis_masked_responses": 0.0}),
        ("sequence_mask", 1.2, [0.0] * 3 + [0.4275] * 4, {"tis_masked": 3 / 7, "tis_masked_responses": 1 / 3}),
    ],
)
def test_masked_weights_and_their_shares(mode, cap, wanted, masked):
    rollout = torch.full((7,), -4.0)
    old = rollout + torch.tensor(RATIOS).log()
    weights, metrics = importance(old, rollout, cap, mode, torch.tensor(LENGTHS))
    assert weights.tolist() == pytest.approx(wanted, rel=1e-5) and weights.dtype == torch.float32
    assert {key: value for key, value in metrics.items() if key.startswith("tis_")} == pytest.approx(masked)
    truncated, others = importance(old, rollout, cap)
    assert truncated.tolist() == pytest.approx([min(ratio, cap) for ratio in RATIOS], rel=1e-5)
    shared = [key for key in metrics if key.startswith("mismatch")]
    assert len(shared) == 4 and [metrics[key] for key in shared] == [others[key] for key in shared]


def test_masks_take_nothing_from_other_tokens_gradient():
    """A masked token has no gradient; the mean is still over all tokens."""
    import prime_kernels as pk

    logp = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    weights, _ = importance(logp.detach(), torch.tensor([-1.0, -4.0, -0.5]), 2.0, "token_mask")
    pk.ppo_loss(logp, logp.detach(), torch.tensor([1.0, 1.0, -2.0]), weights=weights, denominator=3).loss.backward()
    assert logp.grad.tolist() == pytest.approx([-1 / 3, 0.0, 2 / 3])


def test_settings_of_the_correction():
    assert RolloutConfig(engine="transformers").cap == 0 and RolloutConfig(engine="vllm").cap == 2
    assert RolloutConfig(engine="transformers", tis="token_mask").resolved().tis_cap == 2
    assert RolloutConfig(engine="vllm", tis="sequence_mask", tis_cap=3).cap == 3
    assert RolloutConfig(engine="vllm", tis="off", tis_cap=3).resolved().tis_cap == 0
    with pytest.raises(ValidationError, match=r"rollout\.tis_cap must be above 0 with rollout\.tis = 'token_mask'"):
        RolloutConfig(tis="token_mask", tis_cap=0)
    with pytest.raises(ValueError, match=r"rollout\.lag = 1 needs"):
        RolloutConfig(engine="vllm", lag=1, tis="off").resolved()


def test_equal_log_probs_weigh_one():
    logp = torch.tensor([-0.3, -7.0])
    weights, metrics = importance(logp, logp.clone(), 2.0)
    assert weights.tolist() == [1.0, 1.0] and metrics["mismatch_ess"] == 1.0
    assert all(metrics[key] == 0 for key in ("mismatch", "mismatch_max", "mismatch_kl", "tis_capped"))


def test_without_a_cap_there_are_metrics_only():
    weights, metrics = importance(torch.zeros(3), torch.ones(3), 0.0)
    assert weights is None and metrics["mismatch"] == 1.0 and "tis_capped" not in metrics
    weights, _ = importance(torch.zeros(0), torch.zeros(0), 2.0, "sequence_mask", torch.tensor([0, 0]))
    assert weights.shape == (0,)


def test_the_k3_estimate_is_the_divergence_of_the_rollout_from_the_trainer():
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(12, generator=generator).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(q.exp(), 200_000, replacement=True, generator=generator)
    _, metrics = importance(p[drawn], q[drawn], 0.0)
    assert metrics["mismatch_kl"] == pytest.approx((q.exp() * (q - p)).sum().item(), rel=0.03)
