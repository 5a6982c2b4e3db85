"""Rows of prompts and responses, attended to without a mask of all pairs: values and gradients of the dense formula."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from prime_kernels._bench.timing import peak_of_tensors
from prime_trainer.data.groups import Group, Response
from prime_trainer.models import traits
from prime_trainer.models.attention import blockwise, flex, segments, tiles
from prime_trainer.models.attention import interface as attention_interface
from prime_trainer.models.attention.segments import Segments
from prime_trainer.scale import recomputation
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("zoo", ROOT / "bench" / "zoo.py")
zoo = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = zoo
spec.loader.exec_module(zoo)

ROW = Segments(((7, (9, 1, 0, 6)), (2, (12, 5)), (11, ()), (13, (4,))))


def seen_by(row, window):
    """bool [1, 1, L, L]"""
    position = row.positions
    seen = row.seen()
    return seen if window is None else seen & (position[:, None] - position < window)


def dense(query, key, value, sinks, settings):
    per_key = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(per_key, 1) for each in (key, value))
    scores = query @ key.transpose(2, 3) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    scores = scores.masked_fill(~seen_by(settings.segments, settings.window), -torch.inf)
    if sinks is None:
        return scores.softmax(3) @ value
    beside = sinks[None, :, None, None].expand(1, -1, scores.shape[2], 1)
    return torch.cat([scores, beside], 3).softmax(3)[..., :-1] @ value


def inputs(length, *, of_values=8, sinks=False, dtype=torch.float64):
    shapes = [(1, 4, length, 8), (1, 2, length, 8), (1, 2, length, of_values)] + [(4,)] * sinks
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_what_a_row_sees():
    row = Segments(((2, (1, 2)), (1, ())))
    assert row.length == 6 and row.positions.tolist() == [0, 1, 2, 2, 3, 0]
    seen = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]
    assert [line.nonzero().flatten().tolist() for line in row.seen()[0, 0]] == seen


@pytest.mark.parametrize("tile_queries", [128, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 10, 100])
@pytest.mark.parametrize("kind", ["plain", "softcap", "sinks", "values of another size", "all three"])
def test_blocks_and_tiles_give_values_and_gradients_of_the_dense_formula(monkeypatch, window, kind, tile_queries):
    """Of 4 queries, a tile has responses one after the other or a part of one, and as few as 1 where keys are many."""
    monkeypatch.setattr(tiles, "TILE_QUERIES", tile_queries)
    if tile_queries == 4:
        monkeypatch.setattr(tiles, "TILE_BYTES", 4 * 4 * 3 * 16)
    monkeypatch.setattr(segments, "WINDOW_QUERIES", 4)
    every = kind == "all three"
    settings = blockwise.Settings(ROW, window, 0.4, 3.0 if every or kind == "softcap" else None)
    leaves = inputs(ROW.length, of_values=6 if every or kind[0] == "v" else 8, sinks=every or kind == "sinks")
    arguments = [*leaves, None][:4]
    want = dense(*arguments, settings)
    upstream = torch.randn_like(want)
    gradients = torch.autograd.grad(want, leaves, upstream)
    for attend in (blockwise.attention, tiles.attention):
        got = attend(*arguments, settings)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        for mine, theirs in zip(torch.autograd.grad(got, leaves, upstream), gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sinks", [False, True])
def test_tiles_in_bfloat16_round_probabilities_and_not_scores(monkeypatch, sinks):
    """Scores of 30 rounded to bfloat16 would be off by 0.06, and outputs by several per cent."""
    monkeypatch.setattr(blockwise, "_multiplies_bfloat16", lambda: True)
    row = Segments(((40, (150, 20, 30)), (9, (3, 5))))
    leaves = inputs(row.length, sinks=sinks, dtype=torch.bfloat16)
    leaves[0].data.mul_(8)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    settings = blockwise.Settings(row, None, 0.4, None)
    got, want = blockwise.attention(*[*leaves, None][:4], settings), dense(*[*exact, None][:4], settings)
    assert torch.equal(got, tiles.attention(*[*leaves, None][:4], settings))
    upstream = torch.randn_like(got)
    found = [got, *torch.autograd.grad(got, leaves, upstream)]
    for mine, theirs in zip(found, [want, *torch.autograd.grad(want, exact, upstream.double())], strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - theirs).norm() < 1.2e-2 * theirs.norm()


@pytest.mark.parametrize("window", [None, 40, 300])
def test_blocks_cover_what_is_seen_once(window):
    row = Segments(((130, (300, 20)), (400, (5, 260)), (700, ())))
    found = torch.zeros(row.length, row.length, dtype=torch.int32)
    for block in row.blocks(window):
        found[block.queries, block.keys] += block.seen(window, "cpu")
    assert torch.equal(found, seen_by(row, window)[0, 0].int())


@pytest.mark.parametrize("window", [None, 40, 300])
def test_flex_attention_gets_the_same_mask(window):
    """The tiles that it skips and those that it takes whole, its rule for pairs, and what it makes of them."""
    row = Segments(((130, (300, 20)), (400, (5, 260)), (700, ())))
    seen = seen_by(row, window)[0, 0]
    some, every = flex.tiles(row, window)
    padded = torch.nn.functional.pad(seen, (0, -row.length % flex.TILE) * 2).unflatten(1, (-1, flex.TILE))
    by_tile = padded.unflatten(0, (-1, flex.TILE)).transpose(1, 2).flatten(2)
    assert torch.equal(some, by_tile.any(2))
    assert not (every & ~by_tile.all(2)).any() and every.any() == (window != 40)
    mask = flex.block_mask(row, window, torch.device("cpu"))
    at = torch.arange(row.length)
    assert torch.equal(mask.mask_mod(0, 0, at[:, None], at[None]), seen)
    assert mask.sparsity() > 50
    with torch.no_grad():
        arguments = [leaf.detach() for leaf in inputs(row.length, dtype=torch.float32)]
        settings = blockwise.Settings(row, window, 0.4, 5.0)
        torch.testing.assert_close(
            flex.attention(*arguments, None, settings), dense(*arguments, None, settings), rtol=0, atol=1e-5
        )


def test_flex_attention_shares_keys_by_powers_of_two():
    with torch.no_grad():
        query, key, value = (torch.randn(1, heads, ROW.length, 8) for heads in (6, 2, 2))
        settings = blockwise.Settings(ROW, None, 0.4, None)
        torch.testing.assert_close(
            flex.attention(query, key, value, None, settings), dense(query, key, value, None, settings),
            rtol=0, atol=1e-5,
        )  # fmt: skip


def test_flex_attention_has_no_backward_pass_on_cpus():
    """What `kernels` goes by: once this fails, CPUs may take it too."""
    arguments = inputs(ROW.length, dtype=torch.float32)
    with pytest.raises(Exception, match="backward"):
        torch.compile(flex_attention, backend="eager")(*arguments, enable_gqa=True).sum().backward()
    assert attention_interface.kernels(torch.device("cpu")) == ("blocks",)
    assert attention_interface.kernels(torch.device("cuda")) == ("flex", "blocks")


def test_memory_grows_with_tokens():
    """Not with their pairs: twice the tokens, twice the memory."""

    def taken(length):
        row = Segments(((length // 4, (length,) * 4),))
        leaves = inputs(row.length, dtype=torch.float32)
        settings = blockwise.Settings(row, None, 0.4, None)
        return peak_of_tensors(lambda: blockwise.attention(*leaves, None, settings).sum().backward())

    small, large = taken(512), taken(1024)
    assert large < 2.1 * small
    assert large < 40 * 4 * 1024 * 4.25 * 32  # of a score of each pair of tokens alone there would be 290 MB


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "qwen3", "olmo3"])
def test_log_probs_of_models_to_five_digits(name):
    """In float32 against one pass a sequence; gradients relative to the largest."""
    torch.manual_seed(0)
    model = zoo.build(name, zoo.names()[name])
    for parameter in model.parameters():  # to a spread at which logits are of the size of real ones
        parameter.data.mul_(0.3 if parameter.ndim > 1 else 1.0)
    assert traits.of(model).masks.kernel == "blocks"
    batch, leaves = Batch.for_model(model, zoo.groups()), list(model.parameters())
    (micro,) = batch.micro_batches(range(len(batch.groups)), 1000)
    got = torch.zeros(batch.num_tokens).index_put((micro.tokens,), log_probs(model, micro, batch.ids[micro.tokens]))
    want = zoo.by_itself(model, batch)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    upstream = torch.randn_like(want)
    mine, theirs = (torch.autograd.grad(out, leaves, upstream, allow_unused=True) for out in (got, want))
    scale = max(each.abs().max().item() for each in theirs if each is not None)
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * scale)


def test_a_pass_leaves_the_model_its_attention_and_recomputes_with_ours():
    """Activation checkpointing runs layers in the backward pass, when the model has its own attention again."""
    groups = [Group([5, 6, 7, 8], [Response([9, 10, 11]), Response([12, 13])])]
    found = []
    for what in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = zoo.build("gemma2", zoo.names()["gemma2"])
        batch = Batch.for_model(model, groups)
        recomputation.recompute_activations(model, what, attention_interface.as_it_was(model))
        (micro,) = batch.micro_batches([0], 100)
        log_probs(model, micro, batch.ids[micro.tokens]).sum().backward()
        assert model.config._attn_implementation == "eager"
        found.append([param.grad for param in model.parameters()])
    for one, selective, full in zip(*found, strict=True):
        assert torch.equal(one, selective)
        torch.testing.assert_close(one, full, rtol=0, atol=1e-6)


def test_what_a_layer_asks_for_beyond_a_row_is_refused():
    mask = attention_interface.mask(Segments(((2, (1, 1)),)), None, "blocks", torch.device("cpu"))
    query = torch.zeros(1, 1, 4, 2)
    layer, refused = torch.nn.Identity(), attention_interface.UnsupportedLayer
    for name, value, said in (
        ("dropout", 0.1, "expected 0, got 0.1"),
        ("position_bias", query, "expected None, got float32 [1, 1, 4, 2]"),
        ("is_causal", False, "expected True, got False"),
    ):
        with pytest.raises(refused, match=rf"^Identity's {name}: {re.escape(said)}$"):
            attention_interface._attend(layer, query, query, query, mask, **{name: value})
    for inputs, name in (((query[:, :, 1:], query), "query"), ((query, query[:, :, 1:]), "key")):
        with pytest.raises(
            refused, match=rf"^Identity's {name}: expected the 4 tokens of one row, got .*\[1, 1, 3, 2\]$"
        ):
            attention_interface._attend(layer, *inputs, query, mask)
    for other, said in ((mask.clone(), r"bool \[1, 1, 4, 4\]"), (None, "None")):
        with pytest.raises(refused, match=f"^Identity's attention_mask: expected the row .*, got {said}$"):
            attention_interface._attend(layer, query, query, query, other)
