"""Which causal-LM classes of the installed transformers the trainer reads exactly: python bench/zoo.py > docs/models.md

Each class is built tiny with random weights, in float32, and everything the trainer does with it is compared with each
sequence by itself through model(...).logits: log-probs and gradients of shared and packed rows, the loss of
`sft`, step rewards, and the sampler's log-probs. tests/trainer/models/test_zoo.py runs the same.
"""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import prime_kernels as pk
from prime_trainer.data.groups import Group, Response
from prime_trainer.models import lm_head, traits
from prime_trainer.prm.items import StepResponse
from prime_trainer.prm.step_scorer import Encoded, StepScorer
from prime_trainer.rollout.sampler import Sampling
from prime_trainer.rollout.transformers_sampler import TransformersSampler
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs, predicting

VOCABULARY = 97
# Every size that configurations have a name for, so that models are of a few thousand weights. Windows are shorter than
# the sequences.
SIZES = {
    32: "hidden_size d_model n_embd embed_dim n_embed dim emb_dim attention_hidden_size",
    48: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "dense_intermediate_size intermediate_size_mlp shared_intermediate_size shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
    "num_key_value_heads num_experts_per_tok moe_k moe_topk moe_top_k top_k n_kv_heads linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads",
    8: "head_dim kv_channels linear_key_head_dim linear_value_head_dim global_head_dim swa_head_dim v_head_dim "
    "qk_rope_head_dim qk_nope_head_dim kv_lora_rank mamba_d_state state_size ssm_state_size rotary_dim",
    16: "moe_intermediate_size q_lora_rank hidden_size_per_layer_input moe_shared_expert_intermediate_size "
    "expert_ffn_hidden_size",
    6: "sliding_window attention_window_size window_size",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    1: "n_group topk_group first_k_dense_replace n_shared_experts bos_token_id",
    0: "pad_token_id num_kv_shared_layers",
}
MLA = {"head_dim": None, "num_key_value_heads": 4, "n_group": 1, "topk_group": 1}
MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {"layer_types": ["linear_attention", "full_attention"]}
DECODER = {"is_decoder": True}
OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "axk1", "axk2", "youtu", "glm4_moe_lite", "minicpm3"), MLA),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "kimi_linear"), MLA | {"index_n_heads": 2, "index_head_dim": 16}),
    **dict.fromkeys(("bert", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"), DECODER),
    **dict.fromkeys(("roberta", "roberta-prelayernorm", "roformer", "xlm-roberta", "xlm-roberta-xl"), DECODER),
    **dict.fromkeys(("bert-generation", "big_bird", "roc_bert", "prophetnet"), DECODER),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text", "olmo_hybrid"), DELTA),
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "granitemoehybrid": MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "nemotron_h": {"layer_types": ["mamba", "attention"], "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "minimax": {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gemma4_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
        "num_global_key_value_heads": 2,
    },
    "gemma4_unified_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "dots1": {"layer_types": ["sliding_attention", "full_attention"], "n_shared_experts": 1},
    "zamba": {"layer_types": ["mamba", "hybrid"]},
    "zamba2": {"layer_types": ["mamba", "hybrid"]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 48,
    },
    "xlm": {"n_words": VOCABULARY, "causal": True, "emb_dim": 32},
    "longcat_flash": {"head_dim": None, "num_key_value_heads": 4, "zero_expert_num": 2, "kv_lora_rank": 16},
    "llama4_text": {"attention_chunk_size": 8},
}
# Models of other things than text, or of text and something else whose text model is a class of its own.
OTHER_THINGS = {
    "blt": "bytes with a patcher of its own",
    "fuyu": "vision and text",
    "git": "vision and text",
    "mllama": "vision and text",
    "moshi": "audio",
    "musicgen": "audio",
    "musicgen_melody": "audio",
    "phi4_multimodal": "vision, audio and text",
    "emu3": "vision and text",
}
MUST_BE_EXACT = (
    *("llama", "qwen2", "qwen3", "qwen3_5_text", "gemma2", "gemma3_text", "gemma4_text", "mistral", "phi3"),
    *("olmo2", "olmo3", "granite", "cohere2", "gpt_oss", "deepseek_v3", "lfm2"),
)
"""SmolLM2 is a Llama, Phi-4 a Phi-3."""

TOLERANCE = 2e-3
"""Of log-probs in nats and of gradients relative to their largest; what is wrong is off by 0.05 and more."""


@dataclass(frozen=True)
class Finding:
    """What one class came to. `wrong` is what differs although nothing was refused: it must be empty."""

    model_type: str
    name: str
    status: str
    """`exact`, `exact, one response a row`, `refused`, `not built`."""
    note: str = ""
    attention: str = ""
    sampler: str = ""
    wrong: str = ""


class _Tokenizer:
    """What the sampler asks of one."""

    eos_token_id = 2


def names() -> dict[str, str]:
    """model_type: class, one of each class that transformers registers for causal LMs."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    by_class: dict[str, list[str]] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        by_class.setdefault(name, []).append(model_type)
    of_class = {name: next((t for t in types if t.endswith("_text")), types[-1]) for name, types in by_class.items()}
    of_class["LlamaForCausalLM"] = "llama"
    return {model_type: name for name, model_type in sorted(of_class.items())}


def build(model_type: str, name: str) -> Any:
    """The class with random weights of a spread at which attention is not blind."""
    import transformers

    config_class = transformers.CONFIG_MAPPING[model_type]
    try:
        known = set(config_class().to_dict())
    except Exception:  # some cannot be built with their own defaults
        known = set(inspect.signature(config_class.__init__).parameters) | set(vars(config_class))
    aliases = getattr(config_class, "attribute_map", None) or {}
    sizes: dict[str, Any] = {one: size for size, listed in SIZES.items() for one in listed.split()}
    sizes |= {"vocab_size": VOCABULARY, "eos_token_id": 2}
    sizes |= dict.fromkeys(("initializer_range", "init_std", "initializer_std"), 0.3)
    given = {key: value for key, value in sizes.items() if key in known and key not in aliases}
    given |= OVERRIDES.get(model_type, {})
    config = config_class(**{key: value for key, value in given.items() if value is not None})
    made = getattr(transformers, name)
    with torch.device("meta"):
        size = sum(param.numel() for param in made(config).parameters())
    if size > 4_000_000:
        raise ValueError(f"{size / 1e6:.0f} million weights are not tiny")
    torch.manual_seed(0)
    return made(config).eval().float()


def groups() -> list[Group]:
    """Sequences longer than the windows, an uneven number of responses, one of a single token."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

    return [
        Group(ids(prompt), [Response(ids(length), float(k % 2)) for k, length in enumerate(lengths)])
        for prompt, lengths in ((7, (9, 1, 6)), (2, (12, 5)), (11, (4,)))
    ]


def by_itself(model: Any, batch: Batch) -> Tensor:
    """[T] log-probs of each sequence alone, from the model's own logits."""
    pieces = []
    for group in batch.groups:
        for response in group.responses:
            ids = torch.tensor([group.prompt_ids + response.ids])
            at = len(group.prompt_ids)
            logp = model(input_ids=ids, use_cache=False).logits[0, at - 1 : -1].float().log_softmax(-1)
            pieces.append(logp.gather(1, ids[0, at:, None]).squeeze(1))
    return torch.cat(pieces)


def check(model: Any, other: Any) -> str:
    """What the trainer gets wrong with a model that it has not refused, or nothing; `other` is one of its class."""
    made = groups()
    batch, params = Batch.for_model(model, made), [p for p in model.parameters() if p.requires_grad]
    everything = range(len(made))
    want = by_itself(model, batch)
    upstream = torch.linspace(-1, 1, len(want))
    wanted = torch.autograd.grad(want @ upstream, params, allow_unused=True, retain_graph=True)
    loss = -want.mean()
    wanted_of_loss = torch.autograd.grad(loss, params, allow_unused=True)

    wrong: list[str] = []

    def compare(what: str, got: Tensor, expected: Tensor) -> None:
        error = (got - expected).detach().abs().max().item()
        if not error <= TOLERANCE:
            wrong.append(f"{what} off by {error:.2g}")

    def compare_all(what: str, got: Any, expected: Any) -> None:
        scale = max(e.abs().max().item() for e in expected if e is not None)
        pairs = [(torch.zeros_like(p) if g is None else g, torch.zeros_like(p) if e is None else e)
                 for p, g, e in zip(params, got, expected, strict=True)]  # fmt: skip
        error = max((g - e).abs().max().item() for g, e in pairs) / max(scale, 1e-30)
        if not error <= TOLERANCE:
            wrong.append(f"{what} off by {error:.2g} of the largest")

    out = torch.zeros(batch.num_tokens)
    for micro in batch.micro_batches(everything, 60):
        out = out.index_put((micro.tokens,), log_probs(model, micro, batch.ids[micro.tokens]))
    compare("log-probs", out, want)
    compare_all("gradients", torch.autograd.grad(out @ upstream, params, allow_unused=True), wanted)
    total, gradients = torch.zeros(()), [torch.zeros_like(p) for p in params]
    for micro in batch.micro_batches(everything, 60):
        head = lm_head.head(model, predicting(model, micro))
        part = pk.linear_nll(
            head.hidden, head.weight, batch.ids[micro.tokens], bias=head.bias, denominator=batch.num_tokens,
            **lm_head.options(model),
        )  # fmt: skip
        total = total + part.detach()
        for own, more in zip(gradients, torch.autograd.grad(part, params, allow_unused=True), strict=True):
            if more is not None:
                own += more
    compare("sft's loss", total, loss)
    compare_all("sft's gradients", gradients, wanted_of_loss)

    shifted = _shifted(model, other)
    with torch.no_grad():
        ratios = want - by_itself(shifted, batch)
    found = _scores(model, shifted, made)
    compare("step rewards", found, ratios)
    return "; ".join(wrong)


def _shifted(model: Any, other: Any) -> Any:
    """`other`, of the same class, near the first."""
    other.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(0.02 * torch.randn(param.shape, generator=generator))
    return other


def _scores(model: Any, reference: Any, made: list[Group]) -> Tensor:
    """[T] token rewards of `score` with beta = 1."""
    scorer = StepScorer(
        model, reference, None, beta=1.0, splitter="none", compat=None, micro_batch_tokens=60, max_length=None
    )  # type: ignore[arg-type]
    items = [
        Encoded("", g.prompt_ids, StepResponse(r.ids, cu_steps=[0, len(r.ids)], pieces=[""] * len(r.ids), steps=[""]))
        for g in made
        for r in g.responses
    ]
    found = scorer.score(items)
    return torch.tensor([value for rewards in found for value in rewards.token_rewards])  # type: ignore[union-attr]


def sampled(model: Any) -> tuple[str, str]:
    """(how the transformers engine decodes, what it gets wrong)."""
    try:
        sampler = TransformersSampler(model, _Tokenizer(), batch_size=8)  # type: ignore[arg-type]
    except ValueError as error:
        return "no: " + str(error).split(": ", 1)[1].rsplit(";", 1)[0], ""
    prompts = [group.prompt_ids for group in groups()]
    made = [
        Group(prompt, [Response(s.ids, 0.0, s.logprobs) for s in samples])
        for prompt, samples in zip(
            prompts, sampler.generate(prompts, 3, Sampling(8), list(range(len(prompts)))), strict=True
        )
    ]
    batch = Batch.for_model(model, made)
    trained = torch.zeros(batch.num_tokens)
    with torch.no_grad():
        for micro in batch.micro_batches(range(len(made)), 60):
            trained[micro.tokens] = log_probs(model, micro, batch.ids[micro.tokens])
    error = (trained - batch.rollout_logp).abs().max().item()
    notes = [*(() if sampler.decoding.padded else ("like lengths",))]
    notes += [] if sampler.decoding.reorders else ["prompts repeated"]
    return ", ".join(["yes", *notes]), "" if error <= TOLERANCE else f"sampler off by {error:.2g} nats"


def examine(model_type: str, name: str) -> Finding:
    """One class, all of it."""
    if model_type in OTHER_THINGS or not name.endswith(("CausalLM", "LMHeadModel", "LMHead", "Decoder")):
        return Finding(model_type, name, "not built", OTHER_THINGS.get(model_type, "its text model is another class"))
    try:
        model = build(model_type, name)
        with torch.no_grad():
            model(input_ids=torch.tensor([groups()[0].prompt_ids]), use_cache=False)
    except Exception as error:  # of 150 configurations each may have its own
        return Finding(model_type, name, "not built", f"{type(error).__name__}: {_line(error)}")
    try:
        found = traits.of(model)
    except traits.UnsupportedModel as error:
        return Finding(model_type, name, "refused", _line(error).split("; supported")[0].removeprefix("model: "))
    try:
        wrong = check(model, build(model_type, name))
    except Exception as error:
        return Finding(model_type, name, "refused", f"training ends in {type(error).__name__}: {_line(error)}")
    sampler, also = sampled(model)
    status = "exact" if found.layout == "shared" else "exact, one response a row"
    head = [f"x {found.head.scale:.3g}"] if found.head.scale != 1.0 else []
    head += [] if found.head.softcap is None else [f"cap {found.head.softcap:g}"]
    note = "; ".join([*head, *([found.reason] if found.reason else [])])
    return Finding(model_type, name, status, note, found.attention, sampler, "; ".join(filter(None, (wrong, also))))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def table(findings: list[Finding]) -> str:
    """docs/models.md."""
    import transformers

    counts: dict[str, int] = {}
    for finding in findings:
        counts[finding.status] = counts.get(finding.status, 0) + 1
    lines = [
        "# Models",
        "",
        f"Every causal-LM class of transformers {transformers.__version__}, built tiny with random weights in float32: "
        "log-probs, gradients, `sft`, `score` and the transformers sampler against each sequence by itself "
        "through `model(...).logits`. Written by `python bench/zoo.py > docs/models.md`; a test fails if a class is "
        "wrong without being refused.",
        "",
        ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) + ".",
        "",
        "*Exact*: a row has prompts, each once for its responses. *One response a row*: nothing keeps the responses of "
        "a row apart (recurrent state, positions of the model's own, attention that takes only masks of all pairs of "
        "tokens), so each has its row. *Refused*: the model is not loaded, "
        "with this reason. *Not built*: not a text model of its own, or not to be had in a tiny size.",
        "",
        "| class | trainer | attention | sampler | |",
        "|---|---|---|---|---|",
    ]
    for finding in findings:
        cells = (f"{finding.name}", finding.status, finding.attention, finding.sampler, finding.wrong or finding.note)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    findings = []
    for model_type, name in names().items():
        findings.append(examine(model_type, name))
        print(findings[-1].name, findings[-1].status, findings[-1].wrong, file=sys.stderr)
    print(table(findings), end="")
    return int(any(finding.wrong for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
