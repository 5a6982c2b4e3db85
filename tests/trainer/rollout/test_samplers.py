"""The sampler against transformers' generation, the model's log-probs, and itself in other batches."""

from itertools import chain

import pytest
import torch
from helpers import tiny

from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models import loading
from prime_trainer.models.forward import SIZES, filled
from prime_trainer.rollout import Sampling, TransformersSampler
from prime_trainer.rollout.transformers_sampler import _draw
from prime_trainer.run.seeds import derive_seed
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs

PROMPTS = [group.prompt_ids for group in tiny.random_groups(5, 1, seed=3)]
SEEDS = [derive_seed(0, "test", i) for i in range(len(PROMPTS))]


@pytest.fixture
def sampler(model, tokenizer):
    return TransformersSampler(model, tokenizer, batch_size=8)


def frequent(model, tokenizer, count=2):
    """The tokens that this model samples most often."""
    plain = TransformersSampler(model, tokenizer, batch_size=64).generate(PROMPTS, 8, Sampling(12), SEEDS)
    drawn = torch.tensor([i for group in plain for s in group for i in s.ids])
    return torch.bincount(drawn).argsort(descending=True)[:count].tolist()


def test_greedy_is_what_transformers_generates(model, sampler):
    samples = sampler.generate(PROMPTS, 1, Sampling(12, temperature=0.0), SEEDS)
    for prompt, (sample,) in zip(PROMPTS, samples, strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
        assert sample.ids == expected.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_log_probs_are_the_models(model, sampler, temperature):
    samples = sampler.generate(PROMPTS, 3, Sampling(10, temperature), SEEDS)
    groups = [
        Group(prompt, [Response(s.ids, 0.0, s.logprobs) for s in group])
        for prompt, group in zip(PROMPTS, samples, strict=True)
    ]
    batch = Batch(groups)
    for micro in batch.micro_batches(range(len(groups)), 10_000):
        with torch.no_grad():
            want = log_probs(model, micro, batch.ids[micro.tokens])
        own = [p for group in groups for r in group.responses for p in r.logprobs]
        torch.testing.assert_close(torch.tensor(own)[micro.tokens], want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("given", ["auto", "input"])
def test_log_probs_come_from_the_logits_that_the_trainers_come_from(model_dir, tokenizer, given):
    """Of a bfloat16 model: the float32 sums of the head's product, or rounded ones, as `model.logits_dtype` has it."""
    cfg = ModelConfig(path=str(model_dir), dtype="bfloat16", device="cpu", logits_dtype=given)
    model, prompts = loading.load_model(cfg), [list(range(3 + i, 13 + i)) for i in range(40)]
    sampler = TransformersSampler(model, tokenizer, batch_size=40)
    first = [group[0] for group in sampler.generate(prompts, 1, Sampling(1), range(40))]
    drawn, logp = (torch.tensor([getattr(s, name)[0] for s in first]) for name in ("ids", "logprobs"))
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor(prompts)).last_hidden_state[:, -1]
    exact = hidden.double() @ model.get_output_embeddings().weight.double().T
    off = {
        name: (logp - z.double().log_softmax(-1).gather(-1, drawn[:, None]).squeeze(-1)).abs()
        for name, z in (("auto", exact), ("input", exact.bfloat16()))
    }
    # A sum on the border between two bfloat16 numbers may be rounded either way.
    assert off[given].median() < 1e-5 < 1e-3 < off[{"auto": "input", "input": "auto"}[given]].max()


def test_a_response_depends_on_its_seed_alone(model, tokenizer, sampler):
    alone = [sampler.generate([p], 4, Sampling(10), [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    together = TransformersSampler(model, tokenizer, batch_size=1000).generate(PROMPTS, 4, Sampling(10), SEEDS)
    fewer = sampler.generate(PROMPTS, 2, Sampling(10), SEEDS)
    for a, b, c in zip(alone, together, fewer, strict=True):
        assert [s.ids for s in a] == [s.ids for s in b]
        assert [s.ids for s in a[:2]] == [s.ids for s in c]
    assert len({tuple(s.ids) for s in alone[0]}) == 4
    other = sampler.generate(PROMPTS[:1], 4, Sampling(10), [SEEDS[1]])[0]
    assert [s.ids for s in other] != [s.ids for s in alone[0]]


def test_stops_at_every_end_token_and_keeps_it(model, tokenizer):
    ends = frequent(model, tokenizer)
    model.generation_config.eos_token_id = ends
    sampler = TransformersSampler(model, tokenizer, batch_size=16)
    samples = [s for group in sampler.generate(PROMPTS, 8, Sampling(12), SEEDS) for s in group]
    assert {s.ids[-1] for s in samples if s.finish_reason == "stop"} >= set(ends)
    stops = {*ends, tokenizer.eos_token_id}
    for sample in samples:
        assert not stops & set(sample.ids[:-1]) and len(sample.logprobs) == len(sample.ids)
        assert (sample.ids[-1] in stops) == (sample.finish_reason == "stop")
        assert sample.finish_reason == "stop" or len(sample.ids) == 12


def test_rows_that_end_do_not_disturb_the_others(model, tokenizer):
    before = TransformersSampler(model, tokenizer, batch_size=64).generate(PROMPTS, 8, Sampling(12), SEEDS)
    model.generation_config.eos_token_id = [*frequent(model, tokenizer), 2, 0]
    after = TransformersSampler(model, tokenizer, batch_size=64).generate(PROMPTS, 8, Sampling(12), SEEDS)
    for long, short in zip(chain(*before), chain(*after), strict=True):
        assert long.ids[: len(short.ids)] == short.ids


def test_few_numbers_of_rows_are_decoded(model, tokenizer, monkeypatch):
    """Rows that have ended stay until the next number of rows is reached; what is drawn is the same."""
    sampler = TransformersSampler(model, tokenizer, batch_size=64)
    sampler.stops = torch.tensor(frequent(model, tokenizer, 6))
    seen = []
    forward = sampler._forward
    monkeypatch.setattr(sampler, "_forward", lambda ids, *rest: seen.append(len(ids)) or forward(ids, *rest))
    few = sampler.generate(PROMPTS, 12, Sampling(12), SEEDS)
    counts, seen[:] = list(seen[1:]), []
    with monkeypatch.context() as patch:
        patch.delitem(SIZES, "cpu")
        every = sampler.generate(PROMPTS, 12, Sampling(12), SEEDS)
    assert counts == [min(60, filled(each, "cpu")) for each in seen[1:]] != seen[1:]
    for one, other in zip(chain(*few), chain(*every), strict=True):
        assert one.ids == other.ids and one.finish_reason == other.finish_reason
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=2e-5)


def test_a_low_temperature_is_nearly_greedy(sampler):
    greedy = sampler.generate(PROMPTS, 1, Sampling(8, temperature=0.0), SEEDS)
    cold = sampler.generate(PROMPTS, 1, Sampling(8, temperature=1e-4), SEEDS)
    assert [s[0].ids for s in greedy] == [s[0].ids for s in cold]
    warm = sampler.generate(PROMPTS, 1, Sampling(8, temperature=1.0), SEEDS)
    assert [s[0].ids for s in greedy] != [s[0].ids for s in warm]


def test_bad_prompts_are_named(sampler):
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        sampler.generate([[5], []], 1, Sampling(4), [0, 1])
    with pytest.raises(ValueError, match=r"prompts\[0\] has 509 tokens; with max_new_tokens = 4 .* 512 positions"):
        sampler.generate([[5] * 509], 1, Sampling(4), [0])
    assert len(sampler.generate([[5] * 508], 1, Sampling(4), [0])[0][0].ids) <= 4


def test_the_callers_random_state_is_untouched(sampler):
    before = torch.get_rng_state()
    sampler.generate(PROMPTS, 2, Sampling(4), SEEDS)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_carry_the_weights_version(sampler):
    assert sampler.generate(PROMPTS[:1], 1, Sampling(2), SEEDS[:1])[0][0].weight_version == 0
    sampler.update_weights([], 7)
    assert sampler.generate(PROMPTS[:1], 1, Sampling(2), SEEDS[:1])[0][0].weight_version == 7


@pytest.mark.parametrize("vocabulary", [1, 7, 16, 37])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(vocabulary, temperature):
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(vocabulary, generator=generator)
    if vocabulary > 7:
        logits[vocabulary // 2] = -torch.inf  # never drawn
        logits[-1] = -torch.inf
    count = 40_000
    uniform = torch.rand(count, generator=generator)
    drawn, logp = _draw(logits.expand(count, -1), temperature, uniform, block=8)
    log_p = (logits / temperature).log_softmax(-1)
    torch.testing.assert_close(logp, log_p[drawn], rtol=0, atol=1e-5)
    seen, expected = torch.bincount(drawn, minlength=vocabulary).double(), log_p.exp().double() * count
    assert len(seen) == vocabulary and not seen[expected == 0].any()
    used = expected > 5
    squares = ((seen - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = max(1, int(used.sum()) - 1)
    assert squares < freedom + 4 * (2 * freedom) ** 0.5 + 4


def test_extreme_uniforms_draw_possible_tokens():
    logits = torch.full((2, 37), -torch.inf)
    logits[:, [3, 30]] = torch.tensor([0.0, 1.0])
    drawn, logp = _draw(logits, 1.0, torch.tensor([0.0, 1.0 - 2**-24]), block=8)
    assert drawn.tolist() == [3, 30] and logp.isfinite().all()


def test_seeds_are_stable_and_apart():
    assert derive_seed(0, "rollout", 1, 2) == derive_seed(0, "rollout", 1, 2)
    assert len({derive_seed(a, b) for a in range(30) for b in range(30)}) == 900
    assert 0 <= derive_seed("x") < 2**63
    assert derive_seed("x") == 2858720872202629029  # the same in every version of Python
