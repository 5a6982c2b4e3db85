"""The vectors of the public reference code, to 1e-5: from log-probabilities to the losses."""

import pytest
import torch
from helpers.support import assert_close, offsets

import prime_kernels as pk


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


@pytest.fixture(params=range(4))
def case(request, golden):
    """One case, its padded rows packed: (constants, inputs, outputs, cu_seqlens, cu_groups)."""
    vectors = golden[request.param]
    lengths, n = vectors["response_lengths"], vectors["n_samples"]

    def pack(rows):
        if not isinstance(rows, list) or not isinstance(rows[0], list):
            return torch.tensor(rows)
        return torch.tensor([value for row, length in zip(rows, lengths, strict=True) for value in row[:length]])

    inputs = {name: pack(rows) for name, rows in vectors["inputs"].items()}
    outputs = {name: pack(rows) for name, rows in vectors["outputs"].items()}
    return vectors, inputs, outputs, offsets(lengths), offsets([n] * (len(lengths) // n))


def as_logits(logp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two tokens, and labels, with these log-probabilities up to the ones above 0 (the vectors have some)."""
    inside = logp.clamp(max=-1e-4)
    logits = torch.stack((torch.log(-torch.expm1(inside)), inside), -1)
    return logits, torch.ones(len(logp), dtype=torch.int64)


def test_log_ratios(case, backend):
    _, inputs, outputs, _, _ = case
    possible = (inputs["prm_logp"] < -1e-4) & (inputs["ref_logp"] < -1e-4)
    (prm, ids), (ref, _) = as_logits(inputs["prm_logp"]), as_logits(inputs["ref_logp"])
    result = pk.log_ratios(prm, ref, ids, mask=possible, backend=backend)
    assert_close("golden", result.log_ratio[possible], outputs["token_log_ratio"][possible])


def test_process_rewards(case):
    """Normalised rewards show as differences of undiscounted returns: a single response has no baseline."""
    _, inputs, outputs, cu, _ = case
    responses = cu.numel() - 1
    returns = pk.rloo_advantages(
        inputs["prm_logp"] - inputs["ref_logp"],
        torch.zeros(responses),
        cu,
        torch.arange(responses + 1),
        gamma_process=0.0,
        whiten=False,
    ).returns
    assert_close("golden", returns, outputs["process_reward_batch_norm"])


def test_returns_and_advantages(case):
    constants, inputs, outputs, cu, cu_groups = case
    result = pk.rloo_advantages(
        inputs["prm_logp"] - inputs["ref_logp"],
        inputs["outcome"],
        cu,
        cu_groups,
        gamma_process=constants["gamma_process"],
        gamma_outcome=constants["gamma_outcome"],
        process_coef=constants["rm_coef"],
    )
    assert_close("golden", result.returns, outputs["returns"])
    assert_close("golden", result.advantages, outputs["advantages"])


def test_ppo_loss(case):
    constants, inputs, outputs, _, _ = case
    clip = constants["cliprange"]
    result = pk.ppo_loss(
        inputs["policy_logp"], inputs["old_logp"], outputs["advantages"], clip_low=clip, clip_high=clip
    )
    assert_close("golden", result.loss, outputs["pg_loss"])
    assert_close("golden", result.clip_fraction, outputs["clipfrac"])
    assert_close("golden", result.approx_kl, outputs["ppo_kl"])


def test_prm_loss(case):
    constants, inputs, outputs, cu, cu_groups = case
    ratio = inputs["prm_logp"] - inputs["ref_logp"]
    result = pk.prm_loss(ratio, inputs["outcome"], cu, cu_groups=cu_groups, beta=constants["beta_train"])
    assert_close("golden", result.loss, outputs["prm_ce_loss"])
    assert_close("golden", result.pair_accuracy, outputs["prm_pair_accuracy"])
