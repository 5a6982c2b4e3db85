"""Sampling with the transformers model that is being trained: no second copy of its weights, and its losses' logits.

The loop is our own instead of `generate` for four reasons, each measured on the demo's model: a prompt is read once for
its n responses, rows leave the batch as they end, a token is drawn from one uniform number a row (`torch.multinomial`
draws one exponential a vocabulary entry), and each response has its own random stream.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.forward import filled, new_cache
from ..models.lm_head import logits_dtype, same_logits
from ..models.loading import NamedTensors
from ..models.protocols import CausalLM, Tokenizer
from ..models.traits import first_line
from ..run.seeds import derive_seed
from ..scale.sharding import gathered
from .sampler import LogitsDtype, Sample, Sampling, model_shape


@dataclass(frozen=True)
class Decoding:
    """What a model can do while responses are drawn side by side."""

    padded: bool
    """Prompts of different lengths in one batch, with padding on the left."""
    reorders: bool
    """Rows of the cache are repeated for n responses, and dropped as they end; else prompts are repeated, and rows
    run on until all have ended."""


DECODINGS = [Decoding(*each) for each in itertools.product((True, False), repeat=2)]
"""The fastest first."""

CHECKED = ((2, 11), 3, 6)
"""Lengths of the prompts, responses each, and their longest, on which a way of decoding is proved."""
NOISE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
"""Mean difference of log-probs, in nats, that is rounding in a model of this dtype; of one token it may be ten times
that."""


class TransformersSampler:
    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.shape = model_shape(model, tokenizer)
        self.limit = self.shape.limit
        self.stops = torch.tensor(self.shape.stops, device=model.device)
        self.version = 0
        self._accepts = inspect.signature(model.forward).parameters  # type: ignore[attr-defined]
        with torch.no_grad(), gathered(model), same_logits(model):
            self.decoding = self._proved()

    @property
    def logits_dtype(self) -> LogitsDtype:
        return logits_dtype(self.model)

    def update_weights(self, named_tensors: NamedTensors, version: int) -> None:
        self.version = version  # the weights are the policy's own

    def release(self) -> None:
        pass

    def restart(self) -> None:
        pass

    def close(self) -> None:
        pass

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[list[int]], n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[list[Sample]]:
        self.shape.check_prompts(prompts, sampling)
        # One in shards is whole meanwhile: ranks decode for different lengths of time.
        with gathered(self.model), same_logits(self.model):
            return self._generate(prompts, n, sampling, seeds, self.stops, self.decoding)

    def _generate(
        self,
        prompts: Sequence[list[int]],
        n: int,
        sampling: Sampling,
        seeds: Sequence[int],
        stops: Tensor,
        decoding: Decoding,
    ) -> list[list[Sample]]:
        out: list[list[Sample]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
        alike = [order] if decoding.padded else [
            list(same) for _, same in itertools.groupby(order, key=lambda i: len(prompts[i]))
        ]  # fmt: skip
        per_batch = max(1, self.batch_size // n)
        for indices in alike:
            for at in range(0, len(indices), per_batch):
                chunk = indices[at : at + per_batch]
                chosen, own_seeds = [prompts[i] for i in chunk], [seeds[i] for i in chunk]
                found = self._batch(chosen, n, sampling, own_seeds, stops.to(self.model.device), decoding)
                for i, samples in zip(chunk, found, strict=True):
                    out[i] = samples
        return out

    def _batch(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int], stops: Tensor, decoding: Decoding
    ) -> list[list[Sample]]:
        device, width, count = self.model.device, max(map(len, prompts)), len(prompts) * n
        if not decoding.reorders:
            prompts = [prompt for prompt in prompts for _ in range(n)]
        ids = torch.full((len(prompts), width), int(self.stops[0]), device=device)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, width - len(prompt) :] = 1
        cache = new_cache(self.model)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), cache, decoding)
        rows = torch.arange(count, device=device)  # which response a row of the shrinking batch is
        if decoding.reorders and n > 1:
            of_prompt = rows // n
            cache.reorder_cache(of_prompt)
            logits, mask = logits[of_prompt], mask[of_prompt]
        uniforms = None if sampling.temperature == 0 else _uniforms(seeds, n, sampling.max_new_tokens).to(device)
        tokens = torch.zeros((count, sampling.max_new_tokens), dtype=torch.int64, device=device)
        logps = torch.zeros((count, sampling.max_new_tokens), device=device)
        lengths = torch.full((count,), sampling.max_new_tokens, device=device)
        stopped = torch.zeros(count, dtype=torch.bool, device=device)
        for t in range(sampling.max_new_tokens):
            drawn, logp = _draw(logits, sampling.temperature, None if uniforms is None else uniforms[rows, t])
            tokens[rows, t], logps[rows, t] = drawn, logp
            ended = torch.isin(drawn, stops) & ~stopped[rows]
            lengths[rows[ended]], stopped[rows[ended]] = t + 1, True
            if decoding.reorders and ended.any():
                keep = _kept(stopped[rows])
                rows, mask, drawn = rows[keep], mask[keep], drawn[keep]
                if len(rows):
                    cache.reorder_cache(keep)
            if stopped.all() or t + 1 == sampling.max_new_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(drawn[:, None], mask, mask.sum(1, keepdim=True) - 1, cache, decoding)
        lists = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        samples = [Sample(i[:k], p[:k], "stop" if end else "length", self.version) for i, p, k, end in lists]
        return [samples[at : at + n] for at in range(0, len(samples), n)]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, decoding: Decoding) -> Tensor:
        inputs = {
            "input_ids": ids,
            # Without padding nothing needs a mask.
            "attention_mask": mask if decoding.padded else None,
            "position_ids": positions,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        given = {name: value for name, value in inputs.items() if value is not None and name in self._accepts}
        return self.model(**given).logits[:, -1]

    def _proved(self) -> Decoding:
        """The fastest way of decoding whose log-probs are those of whole sequences. Raises ValueError."""
        name, problems = type(self.model).__name__, []
        if "past_key_values" in self._accepts:
            for decoding in DECODINGS:
                problem = self._problem(decoding)
                if problem is None:
                    return decoding
                problems.append(problem)
        else:
            problems.append("it takes no cache (past_key_values)")
        raise ValueError(
            f"rollout.engine = 'transformers' cannot sample with {name}: {problems[0]}; rollout.engine = 'vllm' may"
        )

    def _problem(self, decoding: Decoding) -> str | None:
        lengths, n, longest = CHECKED
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.shape.vocabulary
        prompts = [torch.randint(vocabulary, (k,), generator=generator).tolist() for k in lengths]
        # Every other token ends a response, so that some rows end before others.
        stops = torch.arange(0, vocabulary, 2)
        try:
            found = self._generate(prompts, n, Sampling(longest), list(range(len(prompts))), stops, decoding)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a model does with inputs that it was not made for
            return f"it ends in {first_line(problem)}"
        errors = []
        for prompt, samples in zip(prompts, found, strict=True):
            for sample in samples:
                ids = torch.tensor([prompt + sample.ids], device=self.model.device)
                logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
                wanted = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).squeeze(1).cpu()
                errors.append((torch.tensor(sample.logprobs) - wanted).abs())
        off = torch.cat(errors)
        noise = NOISE[self.model.get_output_embeddings().weight.dtype]
        if off.mean().item() <= noise and off.max().item() <= 10 * noise:
            return None
        return f"with its cache log-probs are off by {off.mean().item():.2g} nats in the mean"


def _kept(stopped: Tensor) -> Tensor:
    """Rows to go on with: all that have not stopped, and some that have where `filled` asks for more."""
    running = int((~stopped).sum())
    count = min(len(stopped), filled(running, stopped.device.type))
    return stopped.int().argsort(stable=True)[:count].sort().values


def _uniforms(seeds: list[int], n: int, length: int) -> Tensor:
    """[len(seeds) * n, length], each row from its own generator: a response does not depend on its neighbours."""
    rows = []
    for seed in seeds:
        for k in range(n):
            rows.append(torch.rand(length, generator=torch.Generator().manual_seed(derive_seed(seed, k))))
    return torch.stack(rows)


def _draw(logits: Tensor, temperature: float, uniform: Tensor | None, block: int = 256) -> tuple[Tensor, Tensor]:
    """Tokens [b] and their log-probs [b] by inverting the distribution function in two levels (blocks, then within)."""
    scaled = logits.float() if temperature in (0, 1) else logits.float() / temperature
    if uniform is None:
        drawn = scaled.argmax(-1)
        return drawn, scaled.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)
    p = scaled.softmax(-1)
    short = -p.shape[1] % block
    blocks = torch.nn.functional.pad(p, (0, short)).view(len(p), -1, block) if short else p.view(len(p), -1, block)
    levels = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    target = uniform.double()[:, None] * levels[:, -1:]
    which = torch.searchsorted(levels, target, right=True).clamp_max(levels.shape[1] - 1)
    below = torch.where(which > 0, levels.gather(1, (which - 1).clamp_min(0)), 0.0)
    inner = blocks.gather(1, which[:, :, None].expand(-1, 1, block)).squeeze(1)
    steps = inner.double().cumsum(-1)
    # Rounding may leave the target a hair past the block's sum: take the last entry that has any probability.
    last = (inner > 0).long().mul(torch.arange(1, block + 1, device=p.device)).amax(-1, keepdim=True) - 1
    within = torch.minimum(torch.searchsorted(steps, target - below, right=True), last.clamp_min(0))
    drawn = (which * block + within).squeeze(1)
    return drawn, p.gather(1, drawn[:, None]).squeeze(1).log()
