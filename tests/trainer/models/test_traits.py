"""What is proved of a model when it is loaded: its head, its masks, and the rows in which it is read."""

import dataclasses
import logging

import pytest
import torch
import transformers
from helpers import tiny

from prime_kernels.integrations import CausalHead
from prime_trainer.config.sections import ModelConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.models import loading, tokenizers, traits
from prime_trainer.rollout.sampler import Sampling
from prime_trainer.rollout.transformers_sampler import DECODINGS, TransformersSampler
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]


def build(name, attention="sdpa", **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | settings)
    config._attn_implementation = attention
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def error(model, group):
    """Of the trainer's log-probs against each sequence by itself, the largest."""
    batch = Batch.for_model(model, [group])
    (micro,) = batch.micro_batches([0], 10_000)
    with torch.no_grad():
        got = log_probs(model, micro, batch.ids[micro.tokens])
        want = []
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.ids])
            logp = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            want.append(logp.gather(1, torch.tensor(response.ids)[:, None]).squeeze(1))
    return (got - torch.cat(want)).abs().max().item()


@pytest.fixture
def group():
    ids = torch.randint(3, 97, (120,)).tolist()
    return Group(ids[:80], [Response(ids[80:100]), Response(ids[100:])])


@pytest.mark.parametrize("window", [4, 60])
def test_windows_of_models_that_mix_layers(window, group):
    """One that the short probe exceeds, and one that it does not."""
    model = build("Olmo3", layer_types=MIXED, sliding_window=window)
    found = traits.of(model)
    assert found.layout == "shared"
    assert found.masks.windows == {"full_attention": None, "sliding_attention": window}
    assert error(model, group) < 1e-4
    model.traits = dataclasses.replace(found, masks=traits.Masks({"": None}))
    assert error(model, group) > 0.05  # what the trainer used to do


def test_the_window_of_a_model_of_one_kind_of_layer(group):
    model = build("Mistral", sliding_window=50)
    assert traits.of(model).masks.windows == {"": 50} and error(model, group) < 1e-4


def test_windows_that_no_shared_row_exceeds_are_not_probed(monkeypatch):
    longest = []
    run = traits.hidden_states
    monkeypatch.setattr(
        traits, "hidden_states", lambda model, ids, *rest: longest.append(ids.shape[1]) or run(model, ids, *rest)
    )
    assert traits.of(build("Mistral", sliding_window=4096)).masks.windows == {"": None}
    assert max(longest) < 64


def test_state_takes_one_response_a_row_and_says_so(caplog, group):
    traits._say.cache_clear()
    model = build("Lfm2", layer_types=["conv", "full_attention"])
    with caplog.at_level(logging.WARNING):
        found = traits.of(model)
        traits.of(build("Lfm2", layer_types=["conv", "full_attention"]))
    assert found.layout == "rows" and found.masks is None
    (line,) = [record.getMessage() for record in caplog.records if "one response a row" in record.getMessage()]
    assert line.startswith("Lfm2ForCausalLM: one response a row, as rows that share a prompt differ")
    assert error(model, group) < 1e-4
    model.traits = dataclasses.replace(found, layout="shared", masks=traits.Masks({"": None}))
    assert error(model, group) > 0.05


def test_eager_attention_gets_masks_that_are_added(group):
    model = build("Llama", attention="eager")
    assert traits.of(model).layout == "shared" and error(model, group) < 1e-4
    seen = torch.tensor([[[[True, False], [True, True]]]])
    mask = traits.Masks({"": None}).of(seen, None, torch.bfloat16)
    assert mask.dtype == torch.bfloat16 and mask[0, 0].tolist() == [[0, torch.finfo(torch.bfloat16).min], [0, 0]]


def test_the_proof_belongs_to_an_attention():
    model = build("Llama")
    first = traits.of(model)
    assert traits.of(model) is first
    model.config._attn_implementation = "eager"
    assert traits.of(model).attention == "eager"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["Llama", "Lfm2", "Gemma2"])
def test_16_bits(name, dtype):
    """Rounding is no difference, and does not hide one."""
    settings = {"layer_types": ["conv", "full_attention"]} if name == "Lfm2" else {}
    attention = "eager" if name == "Gemma2" else "sdpa"
    found = traits.of(build(name, attention, **settings).to(dtype))
    assert found.layout == ("rows" if name == "Lfm2" else "shared")
    assert found.head == CausalHead(1.0, 30.0 if name == "Gemma2" else None)


def saved(model, directory):
    model.save_pretrained(directory)
    return ModelConfig(path=str(directory), dtype="float32", device="cpu")


@pytest.mark.parametrize(("attention", "used"), [("auto", "eager"), ("eager", "eager")])
def test_models_without_sdpa_run(tmp_path, attention, used, group):
    cfg = saved(build("Gemma2", "eager", layer_types=MIXED, sliding_window=30), tmp_path)
    model = loading.load_model(cfg.model_copy(update={"attention": attention}))
    assert model.config._attn_implementation == used
    assert model.traits.head == CausalHead(1.0, 30.0) and error(model, group) < 1e-4


def test_auto_is_sdpa_where_there_is_sdpa(model_dir):
    assert tiny.load(model_dir).config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_read_is_not_loaded(tmp_path):
    config = transformers.BertConfig(**SMALL | {"is_decoder": True})
    cfg = saved(transformers.BertLMHeadModel(config), tmp_path)
    with pytest.raises(loading.ModelError, match=r"model\.path = .*BertLMHeadModel's logits are not those of"):
        loading.load_model(cfg)


def test_a_model_in_training_mode_with_dropout():
    model = build("Llama", attention_dropout=0.5).train()
    with pytest.raises(traits.UnsupportedModel, match=r"does not give the same twice .* is it in training mode"):
        traits.of(model)


def test_the_layout_that_is_expected_of_a_model_without_data():
    plain, state = build("Llama"), build("Lfm2", layer_types=["conv", "full_attention"])
    for model in (plain, state, build("Olmo3", layer_types=MIXED)):
        assert traits.expected_layout(model, "auto") == traits.of(model).layout
    assert traits.expected_layout(plain, "flash_attention_2") == "varlen"
    assert traits.expected_layout(state, "flash_attention_2") == "rows"


def test_layouts_of_several_models():
    one, other = build("Llama"), build("Lfm2", layer_types=["conv", "full_attention"])
    assert traits.layout_of([one]) == traits.layout_of([one, one]) == "shared"
    assert traits.layout_of([one, other]) == "rows"


class Stops:
    eos_token_id = 2


def test_a_cache_that_cannot_be_reordered_gets_the_prompt_repeated(monkeypatch):
    model = build("Llama")
    model.generation_config.eos_token_id = 2
    prompts, sampling = [[5, 6, 7], [8, 9, 10, 11, 12]], Sampling(20)
    usual = TransformersSampler(model, Stops(), batch_size=8)
    assert usual.decoding == DECODINGS[0]
    want = usual.generate(prompts, 3, sampling, [1, 2])

    def no_reorder(self, indices):
        raise AttributeError("no attribute 'reorder_cache'")

    monkeypatch.setattr(transformers.DynamicCache, "reorder_cache", no_reorder)
    found = TransformersSampler(model, Stops(), batch_size=8)
    assert found.decoding.padded and not found.decoding.reorders
    for mine, theirs in zip(found.generate(prompts, 3, sampling, [1, 2]), want, strict=True):
        assert [(s.ids, s.finish_reason) for s in mine] == [(s.ids, s.finish_reason) for s in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_what_cannot_sample_says_so_in_one_line():
    model = build("Mamba", "eager", state_size=8)
    expected = r"rollout\.engine = 'transformers' cannot sample with MambaForCausalLM: it takes no cache"
    with pytest.raises(ValueError, match=expected) as found:
        TransformersSampler(model, Stops(), batch_size=8)
    assert "\n" not in str(found.value)


def test_a_tokenizer_without_a_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(loading.ModelError, match=r'model\.chat_template = "bare"'):
        tokenizers.render(tokenizer, [{"role": "user", "content": "?"}])
