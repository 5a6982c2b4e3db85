"""What rounding the logits of an output layer costs log-probs, on a model's own hidden states.

    python bench/precision.py examples/demo.toml [--tokens 512] [--mismatch] [--model.path DIR] ... > precision.md

Reads prompts of the configuration's task with its model and takes the log-prob of every next token: from float32
logits, from logits rounded to the model's dtype, and as eager PyTorch computes them. Three differences of each: from
float64 of the same hidden states; of one call from calls of a few tokens, which is the head's alone; and from the same
tokens in padded rows, where the model's layers round differently, too.

With the word --mismatch the engine of the configuration then answers prompts, with float32 and with rounded logits, and
its log-probs are compared with the trainer's, with either.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import prime_kernels as pk
from prime_trainer.config.load import load
from prime_trainer.config.run_config import RunConfig
from prime_trainer.data.groups import Group, Response
from prime_trainer.data.problems import prompt_ids
from prime_trainer.data.tasks import load_task
from prime_trainer.models import lm_head, loading, tokenizers
from prime_trainer.models.forward import hidden_states
from prime_trainer.models.protocols import CausalLM
from prime_trainer.report import markdown
from prime_trainer.rollout import EngineConfig, Sampling, make_sampler
from prime_trainer.run.provenance import environment
from prime_trainer.run.seeds import derive_seed
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs as trainers_log_probs

# Tokens of one of many calls; float64 logits of so many tokens at once.
PART = 37
EXACT_PART = 32

LOGITS: dict[Literal["float32", "input"], str] = {"float32": "float32", "input": "rounded"}

LogProbs = Callable[[pk.Head, Tensor], Tensor]


def of_kernels(logits_dtype: str) -> LogProbs:
    def log_probs(head: pk.Head, ids: Tensor) -> Tensor:
        softcap = None if head.softcap is None else head.softcap / head.scale
        options = {"temperature": 1.0 / head.scale, "softcap": softcap, "logits_dtype": logits_dtype}
        return pk.linear_log_probs(head.hidden, head.weight, ids, bias=head.bias, **options)

    return log_probs


def of_layer(head: pk.Head, ids: Tensor) -> Tensor:
    """As the model's own output layer and a float32 softmax."""
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias).float() * head.scale
    return _pick(logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap), ids)


def exact(head: pk.Head, ids: Tensor) -> Tensor:
    """float64 of the same hidden states and weights."""
    weight, bias = head.weight.double(), None if head.bias is None else head.bias.double()
    parts = []
    for hidden, some in zip(head.hidden.split(EXACT_PART), ids.split(EXACT_PART), strict=True):
        logits = torch.nn.functional.linear(hidden.double(), weight, bias) * head.scale
        parts.append(_pick(logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap), some))
    return torch.cat(parts)


def _pick(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


WAYS: dict[str, LogProbs] = {
    "kernels, float32 logits": of_kernels("float32"),
    "kernels, rounded logits": of_kernels("input"),
    "eager PyTorch": of_layer,
}


def texts_of(cfg: RunConfig, tokens: int) -> list[list[int]]:
    """Prompts of the task as the model reads them, of this many next tokens in all."""
    tokenizer, task = tokenizers.load_tokenizer(cfg.model), load_task(cfg.task, cfg.seed)
    texts: list[list[int]] = []
    left = tokens
    while left > 0:
        (problem,) = task.train(len(texts), 1)
        texts.append(prompt_ids(tokenizer, problem)[: left + 1])
        left -= len(texts[-1]) - 1
    return texts


def one_by_one(model: CausalLM, texts: list[list[int]]) -> Tensor:
    """Hidden states [T, H] that predict the next tokens, a pass a text."""
    device = model.get_output_embeddings().weight.device
    passes = (hidden_states(model, torch.tensor([text], device=device), None, None) for text in texts)
    return torch.cat([hidden[0, :-1] for hidden in passes])


def in_padded_rows(model: CausalLM, texts: list[list[int]]) -> Tensor:
    """The same from one pass of rows that end in padding, which no token sees."""
    device, longest = model.get_output_embeddings().weight.device, max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device=device)
    hidden = hidden_states(model, ids, None, None)
    return torch.cat([row[: len(text) - 1] for row, text in zip(hidden, texts, strict=True)])


def apart(one: Tensor, other: Tensor) -> tuple[str, str]:
    """Mean and worst difference, in nats."""
    difference = (one.double() - other.double()).abs()
    return f"{difference.mean().item():.1e}", f"{difference.max().item():.1e}"


def measure(head: pk.Head, padded: pk.Head, ids: Tensor) -> list[dict[str, str]]:
    """A row for each way, of one head on the hidden states of both layouts."""
    want, rows = exact(head, ids), []
    for name, log_probs in WAYS.items():
        found = log_probs(head, ids)
        calls = zip(head.hidden.split(PART), ids.split(PART), strict=True)
        parts = torch.cat([log_probs(head._replace(hidden=hidden), some) for hidden, some in calls])
        columns = {
            "error": apart(found, want),
            f"calls of {PART} tokens": apart(found, parts),
            "another layout": apart(found, log_probs(padded, ids)),
        }
        rows.append({"log-probs": name} | {key: " / ".join(pair) for key, pair in columns.items()})
    return rows


def mismatch(cfg: RunConfig, model: CausalLM) -> list[dict[str, str]]:
    """A row for each pair of an engine's logits and the trainer's; the engine's own responses to the task's prompts."""
    tokenizer, task = tokenizers.load_tokenizer(cfg.model), load_task(cfg.task, cfg.seed)
    prompts = [prompt_ids(tokenizer, problem) for problem in task.train(0, cfg.rollout.prompts_per_step)]
    seeds = [derive_seed("precision", k) for k in range(len(prompts))]
    sampling, rows = Sampling(cfg.rollout.max_new_tokens, cfg.rollout.temperature), []
    elsewhere = cfg.rollout.engine == "vllm-server"  # not in this process, whose time is counted
    for engine in LOGITS:
        lm_head.set_logits_dtype(model, engine)
        asked = cfg.model.model_copy(update={"logits_dtype": engine})
        with closing(make_sampler(EngineConfig(cfg.rollout, asked, cfg.output), model, tokenizer)) as sampler:
            if cfg.model.dtype != "float32" and sampler.logits_dtype != engine:
                raise ValueError(f"the engine {cfg.rollout.engine} has {sampler.logits_dtype!r} logits, not {engine!r}")
            sampler.generate(prompts[:1], 1, sampling, seeds[:1])
            begin = time.process_time()
            samples = sampler.generate(prompts, cfg.rollout.n, sampling, seeds)
            seconds = time.process_time() - begin
        batch = Batch.for_model(model, [
            Group(prompt, [Response(s.ids, 0.0, s.logprobs) for s in group])
            for prompt, group in zip(prompts, samples, strict=True)
        ])  # fmt: skip
        for trainer in LOGITS:
            lm_head.set_logits_dtype(model, trainer)
            found = torch.empty_like(batch.rollout_logp)
            for micro in batch.micro_batches(range(len(prompts)), cfg.micro_batch_tokens):
                found[micro.tokens] = trainers_log_probs(model, micro, batch.ids[micro.tokens], cfg.rollout.temperature)
            rows.append({
                f"logits of {cfg.rollout.engine}": LOGITS[engine], "of the trainer": LOGITS[trainer],
                "mismatch": " / ".join(apart(found, batch.rollout_logp)),
                "tokens": str(len(found)),
                "processor ms a token": "" if elsewhere else f"{1e3 * seconds / len(found):.1f}",
            })  # fmt: skip
    return rows


@torch.no_grad()
def main() -> None:
    words, tokens = sys.argv[1:], 512
    with_mismatch = "--mismatch" in words
    if with_mismatch:
        words.remove("--mismatch")
    if "--tokens" in words:
        at = words.index("--tokens")
        tokens = int(words[at + 1])
        del words[at : at + 2]
    cfg = load(Path(words.pop(0)), words)
    texts, model = texts_of(cfg, tokens), loading.load_model(cfg.model)
    head, padded = (lm_head.head(model, read(model, texts)) for read in (one_by_one, in_padded_rows))
    ids = torch.tensor([token for text in texts for token in text[1:]], device=head.hidden.device)
    ratio = pk.linear_log_ratios(head, head._replace(weight=head.weight.clone()), ids).log_ratio
    print(f"{cfg.model.dtype}, {len(ids)} next tokens of {len(texts)} prompts; mean / worst, in nats\n")
    print(markdown.table(measure(head, padded, ids)))
    print(f"Largest log-ratio of equal weights: {ratio.abs().max().item()}\n")
    if with_mismatch:
        print(markdown.table(mismatch(cfg, model)))
    print(environment())


if __name__ == "__main__":
    main()
