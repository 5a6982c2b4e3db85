"""The loss over probable tokens (DistRL): what is found, advantages, gradients, and independence of passes."""

import math

import pytest
import torch
from helpers import tiny
from pydantic import ValidationError

import prime_kernels as pk
from prime_trainer.config.run_config import RunConfig
from prime_trainer.config.sections import PolicyConfig, PRMConfig
from prime_trainer.plan import plan
from prime_trainer.scale.transfer import fetched
from prime_trainer.train.batch import Batch
from prime_trainer.train.candidates import candidate_targets
from prime_trainer.train.forward import candidates, log_probs, predicting
from prime_trainer.train.policy_step import Targets, minibatches_of, policy_update
from prime_trainer.train.prm_step import PRMScorer, Scorer
from prime_trainer.train.trainable import Trainable

MIN_PROB = 0.02
BETA = 2.0


@pytest.fixture
def batch():
    return Batch(tiny.random_groups(4, 3))


def all_log_softmax(model, batch):
    """[T, V] in float64."""
    found = torch.zeros(batch.num_tokens, len(model.get_output_embeddings().weight), dtype=torch.float64)
    for micro in batch.micro_batches(range(len(batch.groups)), 10_000):
        logits = predicting(model, micro).double() @ model.get_output_embeddings().weight.double().T
        found = found.index_put((micro.tokens,), logits.log_softmax(-1))
    return found


def trainable(model_dir, lr=1e-3):
    return Trainable(tiny.load(model_dir), lr=lr, grad_clip=1e9)


def scorer(model_dir, micro_batch_tokens=10_000, **cfg):
    cfg = PRMConfig(**{"ref_type": "policy", "beta": BETA, "lr": 1e-2, **cfg})
    frozen = Scorer(tiny.load(model_dir), None, micro_batch_tokens, 1.0, MIN_PROB)
    return PRMScorer(frozen, trainable(model_dir, cfg.lr), cfg)


def targets_of(batch, scores, coef=0.5):
    return candidate_targets(batch, scores, BETA, coef)


@pytest.mark.parametrize("update", ["after", "before", "reverse", "none"])
def test_what_the_passes_find(model_dir, batch, update):
    """All tokens of at least min_prob, with the PRM's log-probs of after its update where there is one before them."""
    scoring = scorer(model_dir, update=update)
    old = all_log_softmax(scoring.frozen.policy, batch).detach()
    before = all_log_softmax(scoring.prm.model, batch).detach()
    scores = scoring.score(batch)
    prm = before if update in ("reverse", "none") else all_log_softmax(scoring.prm.model, batch).detach()
    assert torch.equal(prm, before) == (update in ("reverse", "none"))
    found, there = scores.candidates, old >= math.log(MIN_PROB)
    assert found.ids.shape[1] == there.sum(1).max() < 50 and there.sum() > batch.num_tokens
    mine = [set(ids[logp > -math.inf].tolist()) for ids, logp in zip(found.ids, found.old_logp, strict=True)]
    assert mine == [set(row.nonzero().flatten().tolist()) for row in there]
    real = found.old_logp > -torch.inf
    torch.testing.assert_close(found.old_logp[real].double(), old.gather(1, found.ids)[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.prm_logp[real].double(), prm.gather(1, found.ids)[real], rtol=1e-5, atol=1e-5)
    assert scores.metrics["candidates"] == pytest.approx(there.sum().item() / batch.num_tokens)
    mass = old.exp()[there].sum().item() / batch.num_tokens
    assert scores.metrics["candidate_mass"] == pytest.approx(mass, rel=1e-5)


@pytest.mark.parametrize("update", ["after", "none"])
def test_the_sampled_tokens_scores_are_those_without_candidates(model_dir, batch, update):
    scoring = scorer(model_dir, update=update)
    plain = PRMScorer(Scorer(scoring.frozen.policy, None, 10_000), trainable(model_dir, 1e-2), scoring.cfg)
    scores, others = scoring.score(batch), plain.score(batch)
    assert torch.equal(scores.old_logp, others.old_logp) and torch.equal(scores.prm_logp, others.prm_logp)
    assert others.candidates is None and "candidates" not in others.metrics


@pytest.mark.parametrize("update", ["after", "before"])
def test_advantages_match_the_formula(model_dir, batch, update):
    """In the units of the PRM that scores the candidates: before the first update every value is 0."""
    scoring = scorer(model_dir, update=update, kind="prefix")
    scores = scoring.score(batch)
    targets, found = targets_of(batch, scores), scores.candidates
    assert scores.log_ratio.any() == (update == "before")
    logp = all_log_softmax(scoring.prm.model, batch).detach().gather(1, batch.ids.unsqueeze(1)).squeeze(1)
    values, start = [], 0
    for length in batch.cu_seqlens.diff().tolist():
        span = slice(start, start + length)
        values += (BETA * (logp[span] - scores.old_logp[span].double())).cumsum(0).tolist()
        start += length
    deviation = torch.tensor(values, dtype=torch.float64).std().item()
    for t in range(batch.num_tokens):
        for k in range(found.ids.shape[1]):
            want = 0.0
            if found.old_logp[t, k] > -math.inf:
                want = BETA * float(found.prm_logp[t, k] - found.old_logp[t, k]) / (deviation + 1e-6)
            assert targets.advantages[t, k].item() == pytest.approx(want, rel=1e-4, abs=1e-4)
    assert targets.advantages.abs().max() > 0.1


def test_of_equal_models_advantages_are_exactly_zero(model_dir, batch):
    scores = scorer(model_dir, micro_batch_tokens=50, update="none").score(batch)
    assert not targets_of(batch, scores).advantages.any()


def gradient(model_dir, batch, targets, micro_batch_tokens=10_000, **cfg):
    policy, kept = trainable(model_dir), []
    policy.step = lambda scale: kept.append([p.grad.clone() for p in policy.master]) or 0.0
    cfg = PolicyConfig(**{"minibatches": 1, **cfg})
    parts = minibatches_of(batch, cfg, torch.Generator().manual_seed(1))
    metrics = policy_update(policy, batch, targets, cfg, micro_batch_tokens=micro_batch_tokens, parts=parts)
    (grads,) = kept
    return grads, fetched(metrics)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("moved", [False, True], ids=["on policy", "clipped"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_loss_and_gradient_match_autograd_of_the_formula(model_dir, batch, loss_mean, moved, entropy_coef):
    scores = scorer(model_dir, update="before").score(batch)
    targets = targets_of(batch, scores, coef=0.5)
    if moved:  # as after other updates: ratios on both sides of the clip
        shift = 0.5 * torch.randn(targets.old_logp.shape, generator=torch.Generator().manual_seed(3))
        targets = type(targets)(targets.ids, targets.old_logp - shift.abs() * 0.7, targets.advantages, 0.5)
    advantages = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(2))
    options = {"loss_mean": loss_mean, "clip_high": 0.28, "entropy_coef": entropy_coef}
    got, metrics = gradient(model_dir, batch, Targets(advantages, candidates=targets), **options)
    model, lengths = tiny.load(model_dir), batch.cu_seqlens.diff()
    logp = all_log_softmax(model, batch)
    share = torch.full((batch.num_tokens,), 1.0 / batch.num_tokens, dtype=torch.float64)
    if loss_mean == "sequence":
        share = torch.repeat_interleave(1.0 / lengths.double(), lengths) / batch.num_responses
    there, old = targets.old_logp > -torch.inf, targets.old_logp.double()
    rho = (logp.gather(1, targets.ids) - old).masked_fill(~there, 0.0).exp()
    worse = torch.minimum(rho * targets.advantages, rho.clamp(0.8, 1.28) * targets.advantages)
    of_candidates = -((old.exp() * worse).masked_fill(~there, 0.0).sum(1) * share).sum()
    sampled = logp.gather(1, batch.ids.unsqueeze(1)).squeeze(1)
    loss = -(sampled * advantages * share).sum() + 0.5 * of_candidates
    loss = loss + entropy_coef * ((logp.exp() * logp).sum(1) * share).sum()
    assert metrics["distribution_loss"] == pytest.approx(of_candidates.item(), rel=1e-4, abs=1e-6)
    for mine, exact in zip(got, torch.autograd.grad(loss, list(model.parameters())), strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-3, atol=2e-5 * max(1.0, exact.abs().max().item()))


@pytest.mark.parametrize("options", [{}, {"loss_mean": "sequence"}, {"minibatches": 2, "epochs": 2}], ids=str)
@pytest.mark.parametrize("update", ["after", "before"])
def test_micro_batches_do_not_change_the_step(model_dir, batch, options, update):
    results = []
    for micro_batch_tokens in (10_000, 1):
        scores = scorer(model_dir, micro_batch_tokens, update=update, lr=1e-3).score(batch)
        policy = trainable(model_dir)
        policy.optimizer, policy.lr = torch.optim.SGD(policy.master, lr=1.0), 1.0
        beside = targets_of(batch, scores)
        cfg = PolicyConfig(**{"minibatches": 1, **options})
        metrics = policy_update(
            policy, batch, Targets(torch.zeros(batch.num_tokens), scores.old_logp, candidates=beside), cfg,
            micro_batch_tokens=micro_batch_tokens,
            parts=minibatches_of(batch, cfg, torch.Generator().manual_seed(1)),
        )  # fmt: skip
        results.append((policy.master, scores.candidates, fetched(metrics)))
    (whole, one, values), (split, other, others) = results
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.prm_logp, other.prm_logp, rtol=0, atol=1e-3)
    for a, b in zip(whole, split, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    start = tiny.load(model_dir).parameters()
    assert max((a - b).abs().max().item() for a, b in zip(whole, start, strict=True)) > 1e-3
    assert all(values[key] == pytest.approx(others[key], abs=2e-4, rel=1e-3) for key in values)


def test_a_pass_without_responses(model_dir, batch):
    """As a rank has it that has fewer passes than others."""
    model, micro = tiny.load(model_dir), batch._micro([[(0, [])]], 100)
    found = candidates(model, micro, batch.ids[micro.tokens], min_prob=MIN_PROB)
    assert found.ids.shape == (0, 50) and found.token_logp.shape == (0,)
    logp = log_probs(model, micro, torch.zeros(0, 3, dtype=torch.int64))
    pk.distribution_ppo_loss(logp, torch.zeros(0, 3), torch.zeros(0, 3), denominator=7).loss.backward()
    assert logp.shape == (0, 3) and not any(p.grad is not None and p.grad.any() for p in model.parameters())


def settings(given, **changes):
    return {"prm": {"ref_type": "policy"}, "algorithm": {"candidates": given}} | changes


@pytest.mark.parametrize(
    ("given", "changes", "message"),
    [
        ({"coef": -1.0}, {}, "greater than or equal to 0"),
        ({"coef": 0.1, "min_prob": 0.001}, {}, "greater than or equal to 0.01"),
        ({"coef": 0.1, "min_prob": 1.5}, {}, "less than or equal to 1"),
        ({"min_prob": 0.2}, {}, "min_prob is for coef above 0, got min_prob 0.2 with coef 0"),
        (
            {"coef": 0.1},
            {"prm": {}},
            r"algorithm.candidates.coef = 0.1 compares the PRM with the policy that sampled: expected prm.ref_type "
            r"'policy' and algorithm.process_coef above 0, got 'freeze' and 1",
        ),
        ({"coef": 0.1}, {"scale": {"vocab_parallel_head": True}}, "scale.vocab_parallel_head must be false, got true"),
        ({"coef": 0.1}, {"rollout": {"temperature": 0.7}}, "rollout.temperature must be 1"),
    ],
)
def test_configurations_that_are_refused(given, changes, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig(**settings(given, **changes))


def test_needs_and_plan():
    off, on = (RunConfig(**settings({"coef": coef})) for coef in (0.0, 0.1))
    assert not RunConfig().needs.candidates and RunConfig().algorithm.candidates.min_prob == 0.1
    assert off.needs.fused_policy_loss and not on.needs.fused_policy_loss and on.needs.candidates


def test_a_plan_counts_the_pass_of_the_candidates(model_dir):
    model = {"path": str(model_dir), "device": "cpu"}
    plans = [plan.make(RunConfig(**settings({"coef": coef}, model=model)), 2, 20) for coef in (0.0, 0.1)]
    key = "PRM: forward, backward, gradients"
    assert plans[1].traffic[key] > plans[0].traffic[key]
    before = settings({"coef": 0.1}, model=model, prm={"ref_type": "policy", "update": "before"})
    assert plan.make(RunConfig(**before), 2, 20).traffic[key] == plans[0].traffic[key]


def test_scores_without_candidates_are_refused(model_dir, batch):
    plain = PRMScorer(Scorer(tiny.load(model_dir), None, 10_000), trainable(model_dir), PRMConfig(ref_type="policy"))
    with pytest.raises(ValueError, match="scores have no candidates: give the scorer the policy and min_prob"):
        targets_of(batch, plain.score(batch))
