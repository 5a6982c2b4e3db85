"""Sampling with the transformers model that is being trained: no second copy of the weights.

The loop is our own instead of `generate` for four reasons, each measured on the demo's model: a prompt is read once for
its n responses, rows leave the batch as they end, a token is drawn from one uniform number a row (`torch.multinomial`
draws one exponential a vocabulary entry), and each response has its own random stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.forward import new_cache
from ..models.protocols import CausalLM, Tokenizer
from ..run.seeds import derive_seed
from ..scale.sharding import gathered
from .sampler import Sample, Sampling, model_shape


class TransformersSampler:
    def __init__(self, model: CausalLM, tokenizer: Tokenizer, *, batch_size: int) -> None:
        self.model, self.batch_size = model, batch_size
        self.shape = model_shape(model, tokenizer)
        self.limit = self.shape.limit
        self.stops = torch.tensor(self.shape.stops, device=model.device)
        self.pad_id = int(self.stops[0])
        self.version = 0

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
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
        out: list[list[Sample]] = [[] for _ in prompts]
        per_batch = max(1, self.batch_size // n)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
        with gathered(self.model):  # one in shards is whole meanwhile: ranks decode for different lengths of time
            for at in range(0, len(order), per_batch):
                chunk = order[at : at + per_batch]
                for i, samples in zip(
                    chunk, self._batch([prompts[i] for i in chunk], n, sampling, [seeds[i] for i in chunk]), strict=True
                ):
                    out[i] = samples
        return out

    def _batch(self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[int]) -> list[list[Sample]]:
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.pad_id, device=device)
        mask = torch.zeros((len(prompts), width), dtype=torch.int64, device=device)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, width - len(prompt) :] = 1
        cache = new_cache(self.model)
        logits = self._forward(ids, mask, (mask.cumsum(1) - 1).clamp_min(0), cache)
        if n > 1:
            cache.batch_repeat_interleave(n)
            logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        uniforms = None if sampling.temperature == 0 else _uniforms(seeds, n, sampling.max_new_tokens).to(device)
        rows = torch.arange(len(prompts) * n, device=device)  # which response a row of the shrinking batch is
        tokens = torch.zeros((len(rows), sampling.max_new_tokens), dtype=torch.int64, device=device)
        logps = torch.zeros((len(rows), sampling.max_new_tokens), device=device)
        lengths = torch.full((len(rows),), sampling.max_new_tokens, device=device)
        stopped = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for t in range(sampling.max_new_tokens):
            drawn, logp = _draw(logits, sampling.temperature, None if uniforms is None else uniforms[rows, t])
            tokens[rows, t], logps[rows, t] = drawn, logp
            ended = torch.isin(drawn, self.stops.to(device))
            lengths[rows[ended]], stopped[rows[ended]] = t + 1, True
            if ended.any():
                keep = (~ended).nonzero().squeeze(1)
                rows, mask, drawn = rows[keep], mask[keep], drawn[keep]
                cache.batch_select_indices(keep)
            if not len(rows) or t + 1 == sampling.max_new_tokens:
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
            logits = self._forward(drawn[:, None], mask, mask.sum(1, keepdim=True) - 1, cache)
        lists = zip(tokens.tolist(), logps.tolist(), lengths.tolist(), stopped.tolist(), strict=True)
        samples = [Sample(i[:k], p[:k], "stop" if end else "length", self.version) for i, p, k, end in lists]
        return [samples[at : at + n] for at in range(0, len(samples), n)]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        return self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]


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
