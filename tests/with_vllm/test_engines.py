"""One contract for all engines: what they sample is what the model they were given says, update after update."""

import random

import numpy
import pytest
import torch
from helpers.engines import GREEDY, Engine, prompts

from prime_trainer.models import loading
from prime_trainer.rollout import Sampling

PROMPTS = prompts()
SEEDS = range(100, 100 + len(PROMPTS))


@pytest.fixture(
    scope="module",
    params=[(kind, tied) for kind in ("transformers", "vllm", "vllm-server") for tied in (True, False)],
    ids=lambda p: f"{p[0]}-{'tied' if p[1] else 'untied'}",
)
def engine(request, configure):
    kind, tied = request.param
    engine = Engine(configure(kind, tied))
    yield engine
    engine.sampler.close()


def test_greedy_is_the_models_after_every_update(engine):
    seen = []
    for version in range(3):
        if version:
            engine.shake(version)
            engine.push(version)
        assert engine.disagreements(PROMPTS) == 0
        first = engine.sampler.generate(PROMPTS, 1, GREEDY, SEEDS)[0][0]
        assert first.weight_version == version
        seen.append(tuple(first.ids))
    assert len(set(seen)) == 3  # or the updates would prove nothing


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_the_trainers(engine, temperature):
    samples = engine.sampler.generate(PROMPTS, 2, Sampling(24, temperature), SEEDS)
    assert engine.log_prob_error(PROMPTS, samples, temperature) < 1e-3


def test_a_response_depends_on_its_seed_alone(engine):
    asked = PROMPTS[:4]
    together = engine.sampler.generate(asked, 3, Sampling(12), SEEDS[:4])
    again = engine.sampler.generate(asked, 3, Sampling(12), SEEDS[:4])
    alone = engine.sampler.generate(asked[2:3], 3, Sampling(12), SEEDS[2:3])
    assert [[s.ids for s in g] for g in together] == [[s.ids for s in g] for g in again]
    assert [s.ids for s in together[2]] == [s.ids for s in alone[0]]
    # Not greedy, whatever the model's generation config says; and neighbouring seeds share nothing.
    assert (
        len({tuple(s.ids) for g in engine.sampler.generate(asked[:1] * 4, 3, Sampling(12), SEEDS[:4]) for s in g}) == 12
    )


def test_the_trainers_random_state_is_untouched(engine):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()

    before, threads = state(), torch.get_num_threads()
    engine.sampler.generate(PROMPTS[:2], 2, Sampling(6), SEEDS[:2])
    engine.push(engine.sampler.version)
    assert state() == before and torch.get_num_threads() == threads


def test_bad_prompts_are_named_and_harm_nothing(engine):
    def ask(*asked):
        return engine.sampler.generate(list(asked), 1, GREEDY, range(len(asked)))

    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        ask([5], [])
    with pytest.raises(ValueError, match=r"prompts\[0\] has 489 tokens; with max_new_tokens = 24 .* 512 positions"):
        ask([5] * 489)
    with pytest.raises(ValueError, match=r"prompts\[1\] has the token 301; the vocabulary has 301"):
        ask([5], [301])
    assert len(ask([5] * 488)[0][0].ids) <= 24


def test_responses_end_at_any_stop_token_or_at_the_limit(engine):
    samples = [s for g in engine.sampler.generate(PROMPTS, 8, Sampling(24), SEEDS) for s in g]
    stops = set(engine.sampler.shape.stops)
    assert stops == {0, 2}
    for sample in samples:
        assert not stops & set(sample.ids[:-1]) and len(sample.logprobs) == len(sample.ids) > 0
        assert sample.finish_reason == ("stop" if sample.ids[-1] in stops else "length")
        assert sample.finish_reason == "stop" or len(sample.ids) == 24
    assert {s.finish_reason for s in samples} == {"stop", "length"}


def test_a_response_of_nothing_but_the_end_is_a_stop(engine):
    """The first token may be the end: one token, a named reason, nothing to decode."""
    with torch.no_grad():
        head = engine.model.get_output_embeddings().weight
        kept = head.clone()
        last = engine.model.base_model(torch.tensor([PROMPTS[0]])).last_hidden_state[0, -1]
        head[2] = 50 * last / last.norm()
    engine.push(7)
    (only,) = engine.sampler.generate(PROMPTS[:1], 1, GREEDY, SEEDS[:1])[0]
    with torch.no_grad():
        head.copy_(kept)
    engine.push(8)
    assert only.ids == [2] and only.finish_reason == "stop" and only.weight_version == 7
    assert engine.tokenizer.decode(only.ids, skip_special_tokens=True) == ""


def test_an_incomplete_set_of_weights_is_refused(engine):
    if engine.cfg.rollout.engine == "transformers":
        pytest.skip("the transformers engine has no weights of its own")
    before = engine.greedy(PROMPTS[:4])
    tensors = dict(loading.named_tensors(engine.model))
    name = "model.layers.1.mlp.up_proj.weight"
    some = {k: v + 1 for k, v in tensors.items() if k != name}
    with pytest.raises(ValueError, match=rf"1 are missing \({name}\), 1 unknown \(other\)"):
        engine.sampler.update_weights((some | {"other": tensors[name]}).items(), 9)
    with pytest.raises(ValueError, match=rf"{name} must have shape \[128, 64\], got \[64, 128\]"):
        engine.sampler.update_weights((tensors | {name: tensors[name].T}).items(), 9)
    assert engine.greedy(PROMPTS[:4]) == before  # neither reached the engine


@pytest.mark.parametrize("kind", ["vllm", "vllm-server"])
def test_more_than_the_engine_can_hold_at_once(kind, configure):
    """Prompts of 10,000 tokens and a cache for 4,000: some wait, and some lose their place in the middle."""
    asked = prompts(64)
    engine = Engine(configure(kind, rollout={"vllm": {"kv_cache_gib": 2**-8}}))
    try:
        engine.push(0)
        samples = engine.sampler.generate(asked, 1, Sampling(100), range(64))
        assert engine.log_prob_error(asked, samples, 1.0) < 1e-3
        assert sum(len(s.ids) for (s,) in samples) > 1000
        again = engine.sampler.generate(asked, 1, Sampling(100), range(64))
        assert [s.ids for (s,) in samples] == [s.ids for (s,) in again]
    finally:
        engine.sampler.close()
