"""Shared-prompt rows compute what one unpadded pass a response computes, and every token goes through exactly once."""

import dataclasses
from itertools import chain

import pytest
import torch
from helpers import tiny

import prime_kernels as pk
from prime_trainer.data.groups import Group, Response
from prime_trainer.models.attention.segments import Segments
from prime_trainer.models.forward import SIZES
from prime_trainer.models.lm_head import head
from prime_trainer.scale.ranks import Ranks
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


def by_micro_batches(model, batch, max_tokens):
    out = torch.zeros(batch.num_tokens)
    for micro in batch.micro_batches(range(len(batch.groups)), max_tokens):
        out = out.index_put((micro.tokens,), log_probs(model, micro, batch.ids[micro.tokens]))
    return out


@pytest.mark.parametrize("max_tokens", [1, 20, 60, 10_000])
@pytest.mark.parametrize("layout", ["shared", "rows", "varlen"])
def test_log_probs_and_gradients_are_those_of_single_passes(model, groups, max_tokens, layout):
    batch = Batch(groups, layout=layout)
    got, want = by_micro_batches(model, batch, max_tokens), one_by_one(model, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    upstream = torch.randn(batch.num_tokens)
    params = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(got @ upstream, params), torch.autograd.grad(want @ upstream, params), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_response_does_not_see_its_siblings(model, groups):
    """Nor other groups of its row."""
    with torch.no_grad():
        before = by_micro_batches(model, Batch(groups), 10_000)
        changed = dataclasses.replace(groups[0].responses[0], ids=[(i + 7) % 301 for i in groups[0].responses[0].ids])
        groups[0] = dataclasses.replace(groups[0], responses=[changed, *groups[0].responses[1:]])
        after = by_micro_batches(model, Batch(groups), 10_000)
    own = len(changed.ids)
    assert not torch.equal(before[:own], after[:own])
    assert torch.equal(before[own:], after[own:])


def test_a_prompt_goes_through_once_for_as_many_responses_as_fit():
    batch = Batch([Group([1] * 1024, [Response([2] * 3072) for _ in range(8)])])
    (whole,) = batch.micro_batches([0], 25_600)
    assert whole.input_ids.shape == (1, 25_600) and whole.attention_mask == Segments(((1024, (3072,) * 8),))
    parts = list(batch.micro_batches([0], 12_000))
    assert [micro.input_ids.shape[1] for micro in parts] == [1024 + 3072 * 3, 1024 + 3072 * 3, 1024 + 3072 * 2]
    single = list(batch.micro_batches([0], 4096))
    assert len(single) == 8 and all(micro.attention_mask is None for micro in single)


def test_sequences_beyond_what_was_proved_have_a_pass_each():
    groups = [Group([1] * 4, [Response([2] * length) for length in lengths]) for lengths in ((3, 6), (2, 7), (1,))]
    batch = Batch(groups, reach=10)
    passes = list(batch.micro_batches(range(3), 1000))
    assert [tuple(micro.input_ids.shape) for micro in passes] == [(1, 18), (1, 6), (1, 11)]
    assert [micro.attention_mask for micro in passes] == [Segments(((4, (3, 6)), (5, ()))), None, None]


def test_passes_are_filled_and_hardly_padded():
    groups = [Group([1] * 4, [Response([2] * length)]) for length in (2, 90, 8, 30, 6, 50)]
    (padded,) = Batch(groups, layout="rows").micro_batches(range(6), 1000)
    assert padded.input_ids.shape == (6, 94)
    for layout in ("shared", "varlen"):
        filled = list(Batch(groups, layout=layout).micro_batches(range(6), 110))
        # Longest first into the first pass with room: 94 + 12, then 54 + 34 + 10 + 6 = 104.
        lengths = [112 - 2, 104] if layout == "shared" else [106, 104]
        assert [micro.input_ids.shape[1] for micro in filled] == lengths


def test_rows_have_few_lengths():
    """Eight of them between a power of two and the next, none above the limit, and no token of a response moves."""
    found = set()
    for length in range(30, 124):
        batch = Batch([Group([1] * 3, [Response([2] * length), Response([3])])])
        (micro,) = batch.micro_batches([0], 127)
        width = micro.input_ids.shape[1]
        assert 4 + length <= width <= min(127, (4 + length) * 9 / 8)
        assert micro.attention_mask.length == width and micro.attention_mask.groups[0] == (3, (length, 1))
        assert micro.predictors.tolist() == [*range(2, length + 2), 2]
        found.add(width)
    assert found == {*range(36, 65, 4), *range(72, 121, 8), 127}


def test_no_row_is_filled_up_where_products_keep_nothing(monkeypatch):
    monkeypatch.delitem(SIZES, "cpu")
    (micro,) = Batch([Group([1] * 3, [Response([2] * 50), Response([3])])]).micro_batches([0], 127)
    assert micro.input_ids.shape == (1, 54)


@pytest.mark.parametrize("max_tokens", [1, 40, 100, 10_000])
@pytest.mark.parametrize("layout", ["shared", "rows", "varlen"])
def test_micro_batches_cover_every_token_once(groups, max_tokens, layout):
    batch = Batch(groups, layout=layout)
    micros = list(batch.micro_batches(range(len(groups)), max_tokens))
    tokens = torch.cat([m.tokens for m in micros])
    responses = torch.cat([m.responses for m in micros])
    assert sorted(tokens.tolist()) == list(range(batch.num_tokens))
    assert sorted(responses.tolist()) == list(range(batch.num_responses))
    for micro in micros:
        assert len(micro.responses) == 1 or micro.input_ids.numel() <= max_tokens
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
