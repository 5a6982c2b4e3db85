"""Shared-prompt rows compute what one unpadded pass a response computes, and every token goes through exactly once."""

import dataclasses
from itertools import chain

import pytest
import torch
from helpers import tiny

import prime_kernels as pk
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.lm_head import head
from prime_trainer.scale.ranks import Ranks
from prime_trainer.train import batch as batch_module
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs, predicting


@pytest.fixture
def groups():
    made = tiny.random_groups(3, 3)
    made.append(Group([5, 6, 7], [Response([8, 9], 1.0), Response([], 0.0), Response([10], 0.0)]))
    made.append(Group([11], [Response([12, 13, 14], 1.0)]))
    return made


def one_by_one(model, batch):
    """[T] each response alone: no padding, no mask, the head's logits as the model makes them."""
    pieces = []
    for group in batch.groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.ids])
            logits = model(input_ids=ids).logits[0].float().log_softmax(-1)
            at = len(group.prompt_ids)
            pieces.append(logits[at - 1 : ids.shape[1] - 1].gather(1, ids[0, at:, None]).squeeze(1))
    return torch.cat(pieces)


def by_micro_batches(model, batch, max_tokens, pack=False):
    out = torch.zeros(batch.num_tokens)
    for micro in batch.micro_batches(range(len(batch.groups)), max_tokens, pack=pack):
        out = out.index_put((micro.tokens,), log_probs(model, micro, batch.ids[micro.tokens]))
    return out


@pytest.mark.parametrize("max_tokens", [1, 60, 10_000])
@pytest.mark.parametrize("layout", ["row a response", "row a group", "packed rows", "varlen"])
def test_log_probs_and_gradients_are_those_of_single_passes(model, groups, monkeypatch, max_tokens, layout):
    monkeypatch.setattr(batch_module, "SHARED_ROW_LIMIT", 0 if layout == "row a response" else 1024)
    batch = Batch(groups, layout="varlen" if layout == "varlen" else "shared")
    got, want = by_micro_batches(model, batch, max_tokens, layout == "packed rows"), one_by_one(model, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    upstream = torch.randn(batch.num_tokens)
    params = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got @ upstream, params), torch.autograd.grad(want @ upstream, params), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@pytest.mark.parametrize("pack", [False, True])
def test_a_response_does_not_see_its_siblings(model, groups, pack):
    """Nor, where rows are packed, other groups."""
    with torch.no_grad():
        before = by_micro_batches(model, Batch(groups), 10_000, pack)
        changed = dataclasses.replace(groups[0].responses[0], ids=[(i + 7) % 301 for i in groups[0].responses[0].ids])
        groups[0] = dataclasses.replace(groups[0], responses=[changed, *groups[0].responses[1:]])
        after = by_micro_batches(model, Batch(groups), 10_000, pack)
    own = len(changed.ids)
    assert not torch.equal(before[:own], after[:own])
    assert torch.equal(before[own:], after[own:])


def test_long_groups_take_a_row_a_response_and_need_no_mask(groups, monkeypatch):
    batch = Batch(groups)
    (shared,) = batch.micro_batches([0], 10_000)
    assert shared.input_ids.shape[0] == 1 and shared.attention_mask is not None
    monkeypatch.setattr(batch_module, "SHARED_ROW_LIMIT", shared.input_ids.shape[1] - 1)
    (single,) = Batch(groups).micro_batches([0], 10_000)
    assert single.input_ids.shape[0] == 3 and single.attention_mask is None


def test_packing_fills_rows():
    groups = [Group([1] * 4, [Response([2] * length)]) for length in (2, 90, 8, 30, 6, 50)]
    batch = Batch(groups)
    (padded,) = batch.micro_batches(range(6), 1000)
    assert padded.input_ids.shape == (6, 94)
    packed = list(batch.micro_batches(range(6), 110, pack=True))
    # Longest first into the first row with room: 94 + 12, then 54 + 34 + 10 + 6 = 104.
    assert [tuple(micro.input_ids.shape) for micro in packed] == [(1, 106), (1, 104)]


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
@pytest.mark.parametrize("pack", [False, True])
def test_micro_batches_cover_every_token_once(groups, max_tokens, pack):
    batch = Batch(groups)
    micros = list(batch.micro_batches(range(len(groups)), max_tokens, pack=pack))
    tokens = torch.cat([m.tokens for m in micros])
    responses = torch.cat([m.responses for m in micros])
    assert sorted(tokens.tolist()) == list(range(batch.num_tokens))
    assert sorted(responses.tolist()) == list(range(batch.num_responses))
    for micro in micros:
        assert micro.input_ids.shape[0] == 1 or micro.input_ids.numel() <= max_tokens
        assert torch.equal(batch.cu_seqlens.diff()[micro.responses], micro.cu_seqlens.diff())
        positions = [torch.arange(batch.cu_seqlens[r], batch.cu_seqlens[r + 1]) for r in micro.responses]
        assert torch.equal(micro.tokens, torch.cat(positions))


def test_minibatches_partition_the_groups():
    batch = Batch(tiny.random_groups(7, 2))
    parts = batch.minibatches(3)
    assert parts == [[0, 1], [2, 3], [4, 5, 6]]
    shuffled = batch.minibatches(3, torch.Generator().manual_seed(1))
    assert sorted(chain(*shuffled)) == list(range(7)) and shuffled != parts
    assert shuffled == batch.minibatches(3, torch.Generator().manual_seed(1))
    assert batch.minibatches(20) == [[k] for k in range(7)]
    assert sum(map(batch.tokens_of, parts)) == batch.num_tokens
    assert sum(map(batch.responses_of, parts)) == batch.num_responses == 14


def test_packed_tensors(groups):
    batch = Batch(groups)
    responses = [r for g in groups for r in g.responses]
    assert batch.ids.tolist() == [i for r in responses for i in r.ids]
    assert batch.cu_seqlens.diff().tolist() == [len(r.ids) for r in responses]
    assert batch.cu_groups.tolist() == [0, 3, 6, 9, 12, 13]
    assert batch.outcomes.tolist() == [r.outcome for r in responses]
    assert groups[3].accuracy == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="groups is empty"):
        Batch([])


def test_ranks_share_every_token_out_in_passes_of_equal_number(groups):
    parts = [[], []]
    for rank, found in enumerate(parts):
        batch = Batch(groups, ranks=Ranks(rank, 2))
        found += list(batch.micro_batches(range(len(groups)), 40))
    assert len(parts[0]) == len(parts[1]) > 1
    tokens = torch.cat([micro.tokens for found in parts for micro in found])
    assert sorted(tokens.tolist()) == list(range(Batch(groups).num_tokens))


def test_a_pass_without_responses_has_losses_of_zero(model, groups):
    """What a rank does while others still have work: its gradients are zeros, and there."""
    batch = Batch(groups[-1:], ranks=Ranks(1, 2))
    (micro,) = batch.micro_batches([0], 100)
    assert len(micro.tokens) == len(micro.responses) == 0
    at, ids = head(model, predicting(model, micro)), batch.ids[micro.tokens]
    none = torch.zeros(0)
    ppo = pk.linear_ppo_loss(at.hidden, at.weight, ids, None, none, denominator=5)
    prm = pk.prm_loss(log_probs(model, micro, ids), batch.outcomes[micro.responses], micro.cu_seqlens)
    assert [x.item() for x in (ppo.loss, ppo.clip_fraction, ppo.approx_kl, prm.loss)] == [0, 0, 0, 0]
    for loss in (ppo.loss, prm.loss):
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert all(not grad.any() for grad in grads)
