"""The policy's update: independent of micro-batches, float32 underneath, and every coefficient acts."""

import copy

import pytest
import torch
from helpers import tiny

from prime_trainer.config.sections import PolicyConfig
from prime_trainer.scale.transfer import fetched
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs
from prime_trainer.train.policy_step import Targets, minibatches_of, policy_update
from prime_trainer.train.trainable import Trainable


@pytest.fixture
def batch():
    return Batch(tiny.random_groups(4, 3))


@pytest.fixture
def advantages(batch):
    return torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(2))


def all_log_probs(model, batch, with_grad=False):
    out = torch.zeros(batch.num_tokens)
    with torch.set_grad_enabled(with_grad):
        for micro in batch.micro_batches(range(len(batch.groups)), 10_000):
            out = out.index_put((micro.tokens,), log_probs(model, micro, batch.ids[micro.tokens]))
    return out


def update(policy, batch, advantages, *, old=None, ref=None, micro_batch_tokens=10_000, **cfg):
    cfg = PolicyConfig(**{"minibatches": 1, **cfg})
    generator = torch.Generator().manual_seed(1)
    targets, parts = Targets(advantages, old, ref), minibatches_of(batch, cfg, generator)
    return fetched(policy_update(policy, batch, targets, cfg, micro_batch_tokens=micro_batch_tokens, parts=parts))


def trainable(model_dir, dtype="float32", lr=1e-3, grad_clip=1e9):
    return Trainable(tiny.load(model_dir, dtype), lr=lr, grad_clip=grad_clip)


def gradient(model_dir, batch, advantages, **options):
    """What the update accumulates, before the optimizer sees it."""
    policy = trainable(model_dir)
    kept = []

    def step(scale):
        kept.append([p.grad.clone() for p in policy.master])
        return 0.0

    policy.step = step
    metrics = update(policy, batch, advantages, **options)
    (grads,) = kept
    return grads, metrics


def of_loss(model_dir, batch, loss):
    model = tiny.load(model_dir)
    return torch.autograd.grad(loss(all_log_probs(model, batch, with_grad=True)), list(model.parameters()))


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


def test_on_policy_gradient_is_that_of_advantage_times_log_prob(model_dir, batch, advantages):
    got, metrics = gradient(model_dir, batch, advantages)
    assert_same(got, of_loss(model_dir, batch, lambda logp: -(logp * advantages).mean()))
    assert metrics["policy_loss"] == pytest.approx(-advantages.mean().item(), abs=1e-5)
    assert metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0


def test_sequence_mean(model_dir, batch, advantages):
    lengths = batch.cu_seqlens.diff()
    weights = torch.repeat_interleave(1 / lengths, lengths) / batch.num_responses
    got, metrics = gradient(model_dir, batch, advantages, loss_mean="sequence", micro_batch_tokens=40)
    assert_same(got, of_loss(model_dir, batch, lambda logp: -(logp * advantages * weights).sum()))
    assert metrics["policy_loss"] == pytest.approx(-(advantages * weights).sum().item(), abs=1e-5)


@pytest.mark.parametrize("estimator", ["k3", "k2"])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_kl_penalty_acts(model_dir, batch, loss_mean, estimator):
    ref = all_log_probs(tiny.load(model_dir), batch) + torch.linspace(-0.5, 0.5, batch.num_tokens)
    lengths = batch.cu_seqlens.diff()
    share = torch.repeat_interleave(1 / lengths, lengths) / batch.num_responses
    share = share if loss_mean == "sequence" else torch.full_like(share, 1 / batch.num_tokens)

    def loss(logp):
        gap = ref - logp
        return 0.3 * ((gap.exp() - gap - 1 if estimator == "k3" else gap * gap / 2) * share).sum()

    zero = torch.zeros(batch.num_tokens)
    got, metrics = gradient(model_dir, batch, zero, ref=ref, kl_coef=0.3, kl_estimator=estimator, loss_mean=loss_mean)
    assert_same(got, of_loss(model_dir, batch, loss))
    assert metrics["kl_ref"] > 0


def test_entropy_bonus_raises_the_entropy(model_dir, batch):
    policy = trainable(model_dir)

    def entropy():
        (micro,) = batch.micro_batches(range(len(batch.groups)), 10_000)
        with torch.no_grad():
            hidden = policy.model(
                input_ids=micro.input_ids, position_ids=micro.position_ids, attention_mask=micro.attention_mask.seen()
            ).logits.flatten(0, 1)[micro.predictors]
        return torch.distributions.Categorical(logits=hidden.float()).entropy().mean().item()

    before = entropy()
    for _ in range(3):
        update(policy, batch, torch.zeros(batch.num_tokens), entropy_coef=0.1)
    assert entropy() > before + 0.05


@pytest.mark.parametrize("options", [{}, {"loss_mean": "sequence"}, {"entropy_coef": 0.1}, {"minibatches": 2}])
def test_micro_batches_do_not_change_the_step(model_dir, batch, advantages, options):
    old = all_log_probs(tiny.load(model_dir), batch)
    whole, split = trainable(model_dir), trainable(model_dir)
    for policy in (whole, split):
        # Plain gradient descent: Adam would blow rounding up to the size of a step where a gradient is nearly zero.
        policy.optimizer = torch.optim.SGD(policy.master, lr=0.1)
        policy.lr = 0.1
    one = update(whole, batch, advantages, old=old, **options)
    other = update(split, batch, advantages, old=old, micro_batch_tokens=1, **options)
    for a, b in zip(whole.master, split.master, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert one.keys() == other.keys()
    assert all(one[key] == pytest.approx(other[key], abs=1e-4) for key in one)


def test_clipped_tokens_get_no_gradient(model_dir, batch):
    logp = all_log_probs(tiny.load(model_dir), batch)
    old, up = logp - 1.0, torch.ones(batch.num_tokens)  # rho = e: above the clip, and the advantage pulls further
    got, metrics = gradient(model_dir, batch, up, old=old)
    assert not any(g.any() for g in got)
    assert metrics["clip_fraction"] == pytest.approx(1.0)
    got, metrics = gradient(model_dir, batch, -up, old=old)
    assert any(g.any() for g in got)
    for clip_high in (0.2, 9.0):  # e is above 2.5, whatever the range
        got, metrics = gradient(model_dir, batch, -up, old=old, dual_clip=2.5, clip_high=clip_high)
        assert not any(g.any() for g in got) and metrics["clip_fraction"] == pytest.approx(1.0)
    # Beside a KL of 0, where the loss has a pass of its own.
    got, metrics = gradient(model_dir, batch, -up, old=old, ref=logp, kl_coef=1.0, dual_clip=2.5)
    assert max(g.abs().max() for g in got) < 1e-5 and metrics["clip_fraction"] == pytest.approx(1.0)
    got, _ = gradient(model_dir, batch, -up, old=old, ref=logp, kl_coef=1.0)
    assert max(g.abs().max() for g in got) > 1e-3


def test_epochs_and_minibatches_are_optimizer_steps(model_dir, batch, advantages):
    policy = trainable(model_dir)
    old = all_log_probs(policy.model, batch)
    metrics = update(policy, batch, advantages, old=old, epochs=2, minibatches=2)
    assert next(iter(policy.optimizer.state.values()))["step"] == 4
    assert metrics["approx_kl"] != 0


def test_small_updates_are_not_rounded_away_in_bfloat16(model_dir):
    policy = trainable(model_dir, "bfloat16", lr=1e-5)
    start = copy.deepcopy(policy.model.lm_head.weight.detach().float())
    for _ in range(300):
        policy.model.lm_head.weight.float().sum().backward()
        policy.step()
    moved = policy.model.lm_head.weight.detach().float() - start
    assert policy.model.lm_head.weight.dtype == torch.bfloat16
    # Each step is 1e-5, far below half a unit in the last place of a typical weight; together they are 3e-3.
    assert moved.mean().item() == pytest.approx(-3e-3, rel=0.05)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_skips_the_step(model_dir, batch, advantages, bad):
    policy = trainable(model_dir, grad_clip=1.0)
    start = [m.clone() for m in policy.master]
    advantages[3] = bad
    metrics = update(policy, batch, advantages)
    assert not torch.tensor(metrics["policy_grad_norm"]).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(start, policy.master, strict=True))
    assert all(state["step"] == 0 for state in policy.optimizer.state.values())
    advantages[3] = 0.0
    update(policy, batch, advantages)
    assert all(m.isfinite().all() for m in policy.master)
    assert any(not torch.equal(a, b) for a, b in zip(start, policy.master, strict=True))


def test_gradient_clip_and_learning_rate_scale(model_dir, batch, advantages):
    policy = trainable(model_dir, grad_clip=1e-3)
    seen = []
    policy.optimizer.step = lambda: seen.append(torch.cat([p.grad.flatten() for p in policy.master]).norm().item())
    policy_update(
        policy, batch, Targets(advantages), PolicyConfig(minibatches=1),
        micro_batch_tokens=10_000, parts=[range(len(batch.groups))], lr_scale=0.25,
    )  # fmt: skip
    assert seen == [pytest.approx(1e-3, rel=1e-3)]
    assert policy.optimizer.param_groups[0]["lr"] == pytest.approx(0.25e-3)


def test_trainable_state_goes_round(model_dir, batch, advantages):
    policy = trainable(model_dir, "bfloat16")
    update(policy, batch, advantages)
    state = copy.deepcopy(policy.state_dict())
    update(policy, batch, advantages)
    again = trainable(model_dir, "bfloat16")
    again.load_state_dict(state)
    update(again, batch, advantages)
    assert all(torch.equal(a, b) for a, b in zip(policy.master, again.master, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(policy.params, again.params, strict=True))


def test_importance_weighs_each_tokens_gradient_and_temperature_divides_the_logits(model_dir, batch, advantages):
    generator = torch.Generator().manual_seed(5)
    weights = torch.rand(batch.num_tokens, generator=generator) * 2
    policy, temperature = trainable(model_dir), 0.7
    kept = []
    policy.step = lambda scale: kept.append([p.grad.clone() for p in policy.master]) or 0.0
    policy_update(
        policy, batch, Targets(advantages, importance=weights), PolicyConfig(minibatches=1),
        micro_batch_tokens=40, parts=[range(len(batch.groups))], temperature=temperature,
    )  # fmt: skip
    model = tiny.load(model_dir)
    total = 0.0
    for micro in batch.micro_batches(range(len(batch.groups)), 10_000):
        logp = log_probs(model, micro, batch.ids[micro.tokens], temperature)
        total = total - (weights * advantages)[micro.tokens] @ logp / batch.num_tokens
    total.backward()
    for got, parameter in zip(kept[0], model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-6)


def test_a_kl_penalty_without_a_reference_is_refused(model_dir, batch, advantages):
    with pytest.raises(ValueError, match=r"policy\.kl_coef = 0\.5 needs the reference's log-probs, got none"):
        update(trainable(model_dir), batch, advantages, kl_coef=0.5)
