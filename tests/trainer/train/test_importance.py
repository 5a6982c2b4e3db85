"""Importance weights and mismatch metrics against their definitions."""

import math

import pytest
import torch

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


def test_equal_log_probs_weigh_one():
    logp = torch.tensor([-0.3, -7.0])
    weights, metrics = importance(logp, logp.clone(), 2.0)
    assert weights.tolist() == [1.0, 1.0] and metrics["mismatch_ess"] == 1.0
    assert all(metrics[key] == 0 for key in ("mismatch", "mismatch_max", "mismatch_kl", "tis_capped"))


def test_without_a_cap_there_are_metrics_only():
    weights, metrics = importance(torch.zeros(3), torch.ones(3), 0.0)
    assert weights is None and metrics["mismatch"] == 1.0 and "tis_capped" not in metrics


def test_the_k3_estimate_is_the_divergence_of_the_rollout_from_the_trainer():
    generator = torch.Generator().manual_seed(3)
    p, q = (torch.randn(12, generator=generator).log_softmax(0) for _ in range(2))
    drawn = torch.multinomial(q.exp(), 200_000, replacement=True, generator=generator)
    _, metrics = importance(p[drawn], q[drawn], 0.0)
    assert metrics["mismatch_kl"] == pytest.approx((q.exp() * (q - p)).sum().item(), rel=0.03)
