"""The functions under the names of other trainers, against their formulas in float64; no trainer is needed."""

from types import SimpleNamespace

import pytest
import torch
from helpers.support import assert_close

from prime_kernels.integrations import openrlhf, trl, verl


@pytest.fixture
def rows():
    return (torch.randn(3, 5, 101) * 4).requires_grad_(), torch.randint(101, (3, 5))


def exact(logits, index, temperature=1.0):
    log_p = (logits.double() / temperature).log_softmax(-1)
    logp = log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1)


def check(got, want, logits, kind="logp"):
    """Values, and the gradient of their sum."""
    assert_close(kind, got, want, extent=16.0)
    (mine,) = torch.autograd.grad(got.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(want.sum(), logits, retain_graph=True)
    assert_close("grad.float32", mine, theirs, extent=1.0)
    assert theirs.abs().sum() > 0


LOG_PROBS = {
    "trl": trl.selective_log_softmax,
    "trl, both": lambda z, ids: trl.selective_log_softmax_and_entropy(z, ids)[0],
    "verl": verl.logprobs_from_logits,
    "verl, naive": verl.logprobs_from_logits_naive,
    "verl, v2": verl.logprobs_from_logits_v2,
    "openrlhf": openrlhf.log_probs_from_logits,
}
ENTROPIES = {
    "trl": trl.entropy_from_logits,
    "trl, both": lambda z: trl.selective_log_softmax_and_entropy(z, torch.zeros(z.shape[:-1], dtype=torch.long))[1],
    "verl": verl.entropy_from_logits,
    "verl, chunked": verl.entropy_from_logits_with_chunking,
    "openrlhf": openrlhf.compute_entropy,
}


@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_probs(rows, name):
    logits, ids = rows
    check(LOG_PROBS[name](logits, ids), exact(logits, ids)[0], logits)


def test_trls_fused_head_rounds_logits_where_asked(monkeypatch):
    """With sums that float32 holds exactly, so that the rounded logits are the same bits in any order of summation."""
    monkeypatch.setattr(trl._INTEGRATION, "patch", lambda **_: None)
    hidden, weight = torch.randint(-99, 100, (9, 16)) / 16, torch.randint(-99, 100, (50, 16)) / 256
    targets, exact_logits = torch.randint(50, (9,)), hidden.double() @ weight.double().T
    rounded = exact_logits.bfloat16().double()
    assert (rounded - exact_logits).abs().max() > 1e-3
    head = trl._chunked_log_prob(None)

    def logp():
        arguments = (hidden.bfloat16(), weight.bfloat16(), None, targets, 0.7, 64, None, 1.0, ("log_probs",))
        return head.apply(*arguments)[0]

    for options, logits in (({}, exact_logits), ({"logits_dtype": "input"}, rounded), ({}, exact_logits)):
        trl.patch(**options)
        assert_close("logp", logp(), exact(logits, targets, 0.7)[0], extent=16.0)
    with pytest.raises(ValueError, match='logits_dtype: expected "float32" or "input", got 16'):
        trl.patch(logits_dtype=16)
    assert_close("logp", logp(), exact(exact_logits, targets, 0.7)[0], extent=16.0)


@pytest.mark.parametrize("name", ENTROPIES)
def test_entropies(rows, name):
    logits, ids = rows
    check(ENTROPIES[name](logits), exact(logits, ids)[1], logits)


def test_temperature(rows):
    logits, ids = rows
    want = exact(logits, ids, 0.6)[0]
    for got in (trl.selective_log_softmax(logits, ids, 0.6), openrlhf.log_probs_from_logits(logits, ids, 0.6)):
        check(got, want, logits)


def test_several_tokens_a_row(rows):
    logits, _ = rows
    index = torch.randint(101, (3, 5, 4))
    want = (logits.double() / 0.6).log_softmax(-1).gather(-1, index)
    check(trl.selective_log_softmax(logits, index, 0.6), want, logits)
    mask = torch.ones_like(index)
    mask[0] = 0
    masked = trl.selective_log_softmax(logits, index, 0.6, mask)
    assert masked[0].abs().sum() == 0
    assert_close("logp", masked[1:], want[1:], extent=16.0)


def test_masked_rows_are_not_read(rows):
    logits, ids = (each.detach().clone() for each in rows)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[1, 2:], logits[1, 2:], ids[1, 2:] = 0, torch.nan, -100
    logp, entropy = trl.selective_log_softmax_and_entropy(logits, ids, row_mask=mask)
    want = exact(logits.nan_to_num(), ids.clamp(min=0))
    for got, expected in zip((logp, entropy), want, strict=True):
        assert_close("logp", got, expected.where(mask.bool(), 0.0), extent=16.0)


@pytest.mark.parametrize(
    "advantage, alone",
    [(verl.compute_rloo_outcome_advantage, 3.0), (verl.compute_rloo_vectorized_outcome_advantage, 0.0)],
)
def test_rloo(advantage, alone):
    """Prompt "a" has rewards 1, 4, 4; "b" 2, 0; "c" one response of 3."""
    rewards = torch.tensor([[1.0, 0], [2, 2], [3, 0], [0, 2], [0, 0], [4, 0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 0], [1, 0]])
    index = ["a", "a", "c", "b", "b", "a"]
    want = torch.tensor([1 - 4.0, 4 - 2.5, alone, 2 - 0.0, 0 - 2.0, 4 - 2.5])[:, None] * mask
    for got in advantage(rewards, mask, index):
        assert_close("sums", got, want)


@pytest.fixture(params=range(4))
def vectors(request, golden):
    found = golden[request.param]
    lengths = torch.tensor(found["response_lengths"])
    inputs = {name: torch.tensor(rows) for name, rows in found["inputs"].items()}
    mask = torch.arange(inputs["prm_logp"].shape[1]) < lengths[:, None]
    return found, inputs, mask


def test_recipe(vectors):
    """What the recipe computes, against vectors of the public reference code."""
    found, inputs, mask = vectors
    outputs = {name: torch.tensor(rows) for name, rows in found["outputs"].items()}
    data = SimpleNamespace(batch={"rm_scores": outputs["process_reward_batch_norm"], "acc": inputs["outcome"]})
    config = SimpleNamespace(algorithm=SimpleNamespace(reward_dpo_coef=found["rm_coef"], reward_gt_coef=1.0))
    if found["gamma_process"] == found["gamma_outcome"] == 1.0:
        advantages, returns = verl.compute_rloo_advantage_return(data, mask, found["n_samples"], config)
        assert_close("golden", returns, outputs["returns"] * mask)
        assert_close("golden", advantages, outputs["advantages"] * mask)
    scores = outputs["token_log_ratio"]
    loss = verl.compute_ce_dpo_loss_rm(scores, inputs["outcome"], mask, found["beta_train"])
    assert_close("golden", loss, outputs["prm_ce_loss"])
    accuracy = verl.compute_dpo_accuracy(scores, inputs["outcome"], mask, found["n_samples"])
    assert_close("golden", accuracy, outputs["prm_pair_accuracy"])


def test_recipe_without_rewards():
    config = SimpleNamespace(algorithm=SimpleNamespace(reward_dpo_coef=0.0, reward_gt_coef=1.0))
    data = SimpleNamespace(batch={"rm_scores": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="data: expected 'rm_scores' or 'acc'"):
        verl.compute_rloo_advantage_return(data, torch.ones(2, 3), 2, config)
