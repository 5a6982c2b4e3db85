"""Which weights score what: the four update modes, the two references, and rewards at three granularities."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from pydantic import ValidationError
from torch.nn.functional import logsigmoid

import prime_kernels as pk
from prime_trainer.config.load import load
from prime_trainer.config.sections import PRMConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.loading import frozen
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs
from prime_trainer.train.prm_objective import Objective, balance_of
from prime_trainer.train.prm_step import PRMScorer, Scorer, process_rewards
from prime_trainer.train.trainable import Trainable


@pytest.fixture
def batch():
    return Batch(tiny.random_groups(4, 3))


def all_log_probs(model, batch):
    out = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        for micro in batch.micro_batches(range(len(batch.groups)), 10_000):
            out[micro.tokens] = log_probs(model, micro, batch.ids[micro.tokens])
    return out


def scorer(model_dir, dtype="float32", micro_batch_tokens=10_000, policy=False, ref=True, prm=True, **cfg):
    cfg = PRMConfig(**{"lr": 1e-3, **cfg})
    without = Scorer(
        tiny.load(model_dir, dtype) if policy else None,
        frozen(tiny.load(model_dir, dtype)) if ref else None,
        micro_batch_tokens,
    )
    if not prm:
        return without
    return PRMScorer(without, Trainable(tiny.load(model_dir, dtype), lr=cfg.lr, grad_clip=cfg.grad_clip), cfg)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("update", ["after", "none", "reverse"])
@pytest.mark.parametrize("micro_batch_tokens", [50, 10_000])
def test_equal_weights_give_a_ratio_of_exactly_zero(model_dir, batch, dtype, update, micro_batch_tokens):
    scores = scorer(model_dir, dtype, micro_batch_tokens, update=update).score(batch)
    assert torch.equal(scores.log_ratio, torch.zeros(batch.num_tokens))
    assert scores.ref_logp.abs().min() > 0
    assert scores.metrics["prm_loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_after_scores_with_the_weights_of_before_the_step(model_dir, batch):
    s = scorer(model_dir, update="after")
    before = all_log_probs(s.prm.model, batch)
    scores = s.score(batch)
    assert torch.equal(scores.prm_logp, before)
    assert not torch.equal(all_log_probs(s.prm.model, batch), before)
    assert scores.metrics["prm_grad_norm"] > 0


def test_after_scores_a_minibatch_with_the_updates_of_the_earlier_ones(model_dir, batch):
    s = scorer(model_dir, update="after", minibatches=2)
    untouched = all_log_probs(s.prm.model, batch)
    scores = s.score(batch)
    half = batch.tokens_of([0, 1])
    torch.testing.assert_close(scores.prm_logp[:half], untouched[:half], rtol=0, atol=1e-5)
    moved = (scores.prm_logp[half:] - untouched[half:]).abs().max()
    assert moved > 1e-3
    # One step on the first half alone gives the weights that scored the second half.
    first = scorer(model_dir, update="after")
    first.score(Batch(batch.groups[:2]))
    expected = all_log_probs(first.prm.model, batch)[half:]
    torch.testing.assert_close(scores.prm_logp[half:], expected, rtol=0, atol=1e-4)


def test_before_scores_with_the_updated_weights(model_dir, batch):
    s = scorer(model_dir, update="before", minibatches=2)
    start = all_log_probs(s.prm.model, batch)
    scores = s.score(batch)
    assert torch.equal(scores.prm_logp, all_log_probs(s.prm.model, batch))
    assert not torch.equal(scores.prm_logp, start)
    assert torch.equal(scores.ref_logp, start)
    # The metrics are those of a PRM that has not learnt from the batch: one update, and that of equal weights.
    s = scorer(model_dir, update="before")
    scores = s.score(batch)
    assert scores.log_ratio.abs().max() > 0
    assert scores.metrics["prm_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert scores.metrics["prm_pair_accuracy"] == 0.5


def test_reverse_scores_everything_before_any_update(model_dir, batch):
    s = scorer(model_dir, update="reverse", minibatches=2)
    start = all_log_probs(s.prm.model, batch)
    scores = s.score(batch)
    assert torch.equal(scores.prm_logp, start)
    same = scorer(model_dir, update="after", minibatches=2)
    same.score(batch)
    for a, b in zip(s.prm.master, same.prm.master, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_none_leaves_the_prm_alone(model_dir, batch):
    s = scorer(model_dir, update="none")
    start = copy.deepcopy(s.prm.model.state_dict())
    scores = s.score(batch)
    assert all(torch.equal(value, start[key]) for key, value in s.prm.model.state_dict().items())
    assert "prm_grad_norm" not in scores.metrics
    assert all(state["step"] == 0 for state in s.prm.optimizer.state.values())


def test_the_policy_as_reference(model_dir, batch):
    s = scorer(model_dir, policy=True, ref=False, update="before")
    with torch.no_grad():
        s.frozen.policy.model.norm.weight.mul_(1.1)
    scores = s.score(batch)
    assert torch.equal(scores.ref_logp, all_log_probs(s.frozen.policy, batch))
    assert torch.equal(scores.old_logp, scores.ref_logp)
    assert scores.log_ratio.abs().max() > 0


def test_without_a_prm_only_the_asked_for_log_probs_are_computed(model_dir, batch):
    scores = scorer(model_dir, policy=True, ref=False, prm=False).score(batch)
    assert torch.equal(scores.old_logp, all_log_probs(tiny.load(model_dir), batch))
    assert scores.ref_logp is None and scores.metrics == {}


def test_a_prm_without_a_reference_is_refused(model_dir, batch):
    with pytest.raises(ValueError, match="a PRM needs the log-probs of its reference"):
        scorer(model_dir, ref=False).score(batch)


def test_a_response_without_tokens_is_in_no_mean(model_dir):
    groups = tiny.random_groups(2, 3)
    groups[0].responses.insert(1, Response([], 1.0))
    norms = []
    for tokens in (10_000, 1):
        found = scorer(model_dir, micro_batch_tokens=tokens).score(Batch(groups))
        norms.append(found.metrics["prm_grad_norm"])
    del groups[0].responses[1]
    norms.append(scorer(model_dir).score(Batch(groups)).metrics["prm_grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4) and norms[0] > 0


@pytest.mark.parametrize(
    "options",
    [
        {}, {"balance": True, "beta": 0.5}, {"kind": "dpo"}, {"kind": "kto"}, {"kind": "nca"}, {"kind": "prefix"},
        {"kind": "prefix", "balance": True, "margin": 1.0},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_update_does_not_depend_on_micro_batches(model_dir, batch, minibatches, options):
    whole = scorer(model_dir, minibatches=minibatches, **options)
    split = scorer(model_dir, minibatches=minibatches, micro_batch_tokens=1, **options)
    for each in (whole, split):
        # AdamW divides by the size of a gradient: with its usual epsilon one that is nothing but rounding, which
        # differs from processor to processor, would move a weight as far as any other.
        each.prm.optimizer.param_groups[0]["eps"] = 1e-4
    one, other = whole.score(batch), split.score(batch)
    for a, b in zip(whole.prm.master, split.prm.master, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)
    assert one.metrics["prm_loss"] == pytest.approx(other.metrics["prm_loss"].item(), abs=1e-5)


def test_the_prm_learns_the_outcomes(model_dir, batch):
    s = scorer(model_dir, lr=3e-3, beta=0.5)
    metrics = [s.score(batch).metrics for _ in range(12)]
    assert metrics[0]["prm_loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert metrics[-1]["prm_loss"] < 0.1 and metrics[-1]["prm_pair_accuracy"] == 1.0


class TestGranularity:
    """Newline is token 9, the end token 2; one response is cut off, one is empty, one ends in a newline."""

    responses = ([5, 9, 6, 7, 9, 2], [8, 6], [], [4, 9], [2])
    ends = ([1, 4, 5], [1], [], [1], [0])

    @pytest.fixture
    def packed(self):
        return Batch([Group([3], [Response(ids) for ids in self.responses])])

    @pytest.fixture
    def step_ends(self):
        return torch.arange(10) == 9

    def expected(self, q, carriers):
        out, carries, at = torch.zeros(len(q)), torch.zeros(len(q), dtype=torch.bool), 0
        for ids, ends in zip(self.responses, carriers, strict=True):
            start = 0
            for end in ends:
                out[at + end] = q[at + start : at + end + 1].sum()
                carries[at + end] = True
                start = end + 1
            at += len(ids)
        return out, carries

    def test_token(self, packed, step_ends):
        q = torch.randn(packed.num_tokens)
        rewards = process_rewards(q, packed, PRMConfig(granularity="token", beta=0.2), step_ends)
        assert rewards.mask is None
        torch.testing.assert_close(rewards.values, 0.2 * q)

    @pytest.mark.parametrize("granularity", ["step", "whole"])
    def test_sums_sit_on_the_last_token_and_keep_the_end_tokens_reward(self, packed, step_ends, granularity):
        q = torch.randn(packed.num_tokens)
        rewards = process_rewards(q, packed, PRMConfig(granularity=granularity, beta=0.2), step_ends)
        carriers = self.ends if granularity == "step" else [ends[-1:] for ends in self.ends]
        values, carries = self.expected(0.2 * q, carriers)
        assert torch.equal(rewards.mask, carries)
        torch.testing.assert_close(rewards.values, values, rtol=0, atol=1e-6)
        totals = pk.segment_sum(rewards.values, packed.cu_seqlens)
        torch.testing.assert_close(totals, pk.segment_sum(0.2 * q, packed.cu_seqlens), rtol=0, atol=1e-6)


def ratios_of(batch, q):
    """[[(log-ratios, outcome) of each response with tokens] of each group]"""
    starts, at, groups = batch.cu_seqlens.tolist(), 0, []
    for group in batch.groups:
        own = [(q[starts[at + k] : starts[at + k + 1]], r.outcome) for k, r in enumerate(group.responses) if r.ids]
        groups.append(own)
        at += len(group.responses)
    return groups


def loss_by_hand(groups, kind, beta, balance, margin):
    """The formulas of `prm_loss` and of `balance_of`, response by response."""
    ratios, groups = groups, [[(q.sum(), a) for q, a in group] for group in groups]
    everyone = [pair for group in groups for pair in group]
    if kind == "kto":
        kl = torch.stack([d.detach() for d, _ in everyone]).mean().clamp(min=0)
        return torch.stack([torch.sigmoid(beta * ((kl - d) if a > 0.5 else (d - kl))) for d, a in everyone]).mean()
    if kind in ("ce", "prefix"):
        losses = []
        for group in ratios:
            mu = sum(a for _, a in group) / len(group)
            for q, a in group:
                shift = math.log(mu / (1 - mu)) if balance and 0 < mu < 1 else 0.0
                weight = (a * (1 - mu) + (1 - a) * mu) if balance else 1.0
                values, apart = beta * q.sum() + shift, 0.0
                if kind == "prefix":
                    means = torch.stack([q[: t + 1].sum() / (t + 1) for t in range(len(q))])
                    values, apart = beta * means + shift, margin
                each = a * logsigmoid(values - apart) + (1 - a) * logsigmoid(-values - apart)
                losses.append(-weight * each.mean())
        return torch.stack(losses).mean()
    pairs = [(w, lo) for group in groups for w, a in group for lo, b in group if a > 0.5 >= b]
    return torch.stack([-logsigmoid(beta * (w - lo)) for w, lo in pairs]).mean()


@pytest.mark.parametrize(
    ("kind", "balance"),
    [("ce", False), ("ce", True), ("kto", False), ("dpo", False), ("prefix", False), ("prefix", True)],
)
@pytest.mark.parametrize("part", [(0, 1, 2, 3), (1, 2)])
def test_objectives_are_the_formulas(kind, balance, part):
    groups = tiny.random_groups(4, 4)
    for k, outcomes in enumerate(([1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.25, 0.0], [1.0] * 4, [0.0, 1.0, 1.0, 1.0])):
        groups[k].responses[:] = [replace(r, outcome=a) for r, a in zip(groups[k].responses, outcomes, strict=True)]
    groups[1].responses.insert(2, Response([], 1.0))  # is in no mean, of its group's outcomes neither
    batch = Batch(groups)
    q = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0)).requires_grad_()
    objective = Objective(batch, part, kind, 0.3, balance_of(batch) if balance else None, margin=0.7)
    loss = objective(q).loss
    want = loss_by_hand([ratios_of(batch, q)[g] for g in part], kind, 0.3, balance, 0.7)
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    (got,), (expected,) = torch.autograd.grad(loss, q), torch.autograd.grad(want, q)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert expected.abs().max() > 1e-3


def test_prefixes_start_at_the_margin_and_learn_the_outcomes(model_dir, batch):
    """Of equal weights every value is 0: -log sigmoid(-5). Pairs are ordered by means, which lengths do not move."""
    s = scorer(model_dir, kind="prefix", lr=3e-3)
    assert (s.cfg.scale, s.cfg.margin) == (10.0, 5.0)
    metrics = [s.score(batch).metrics for _ in range(12)]
    assert metrics[0]["prm_loss"] == pytest.approx(math.log1p(math.exp(5)), abs=1e-5)
    assert metrics[-1]["prm_loss"] < 1.0 and metrics[-1]["prm_pair_accuracy"] == 1.0


def test_beta_depends_on_the_kind_only_where_it_is_not_given(tmp_path):
    def beta(words, text=""):
        path = tmp_path / "run.toml"
        path.write_text(text)
        cfg = load(path, words)
        return cfg.prm.scale, cfg.train_prm.scale

    assert beta([]) == (0.05, 0.05)
    assert beta(["--prm.kind", "prefix"]) == (10.0, 0.05)
    assert beta(["--prm.kind", "prefix", "--prm.beta", "0.05"]) == (0.05, 0.05)
    assert beta([], '[prm]\nkind = "prefix"\nbeta = 3\n[train_prm]\nkind = "prefix"\n') == (3.0, 10.0)
    assert beta(["--prm.kind", "ce"], '[prm]\nkind = "prefix"\n') == (0.05, 0.05)
    q = torch.randn(11)
    batch = Batch([Group([3], [Response([5, 9, 6]), Response([2] * 8)])])
    torch.testing.assert_close(process_rewards(q, batch, PRMConfig(kind="prefix"), None).values, 10.0 * q)


@pytest.mark.parametrize("kind", ["ce", "prefix"])
def test_a_balanced_loss_does_not_learn_from_groups_that_are_all_alike(model_dir, kind):
    groups = tiny.random_groups(2, 3)
    for group in groups:
        group.responses[:] = [replace(r, outcome=1.0) for r in group.responses]
    assert scorer(model_dir, kind=kind, balance=True).score(Batch(groups)).metrics["prm_grad_norm"] == 0.0
    assert scorer(model_dir, kind=kind).score(Batch(groups)).metrics["prm_grad_norm"] > 0.0


def test_what_an_objective_is_not_for_is_refused(batch):
    with pytest.raises(ValidationError, match=r"prm\.balance is for prm\.kind ce or prefix, got 'dpo'"):
        PRMConfig(kind="dpo", balance=True)
    with pytest.raises(ValidationError, match=r"margin is for kind 'prefix', got margin 2 with kind 'ce'"):
        PRMConfig(margin=2.0)
    with pytest.raises(ValidationError, match=r"margin\n.*greater than or equal to 0"):
        PRMConfig(kind="prefix", margin=-1.0)
    with pytest.raises(ValueError, match=r"part: expected consecutive groups, got \[0, 2\]"):
        Objective(batch, [0, 2], "ce", 0.05)
