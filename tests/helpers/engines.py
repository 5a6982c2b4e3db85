"""What tests of real engines share: a sampler beside its model, and what is left behind when all is over."""

import json
import os
import random
from pathlib import Path

import torch

from prime_trainer.data.groups import Group, Response
from prime_trainer.models import loading, tokenizers
from prime_trainer.rollout import EngineConfig, Sampling, make_sampler
from prime_trainer.train.batch import Batch
from prime_trainer.train.forward import log_probs

GREEDY = Sampling(24, temperature=0.0)


def prompts(count=16, shortest=140, seed=0):
    """Longer than a block of 128 keys and values, the largest that any engine has here: short ones are never cached."""
    rng = random.Random(seed)
    return [[rng.randrange(3, 301) for _ in range(shortest + i)] for i in range(count)]


class Engine:
    """A sampler beside the model whose weights it has."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.model, self.tokenizer = loading.load_model(cfg.model), tokenizers.load_tokenizer(cfg.model)
        self.sampler = make_sampler(EngineConfig(cfg.rollout, cfg.model, cfg.output), self.model, self.tokenizer)

    def push(self, version):
        self.sampler.update_weights(loading.named_tensors(self.model), version)

    def greedy(self, prompts):
        return [sample.ids for (sample,) in self.sampler.generate(prompts, 1, GREEDY, range(len(prompts)))]

    def disagreements(self, asked):
        """How many greedy responses differ from what transformers generates with the model's weights."""
        wrong = 0
        for prompt, got in zip(asked, self.greedy(asked), strict=True):
            options = {"do_sample": False, "top_k": None, "max_new_tokens": 24, "pad_token_id": 0}
            want = self.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist()
            wrong += got != want
        return wrong

    @torch.no_grad()
    def shake(self, seed):
        """Other weights, far enough from the last that greedy responses change."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)

    def log_prob_error(self, asked, samples, temperature):
        """Largest difference between the engine's log-probs and those of the trainer."""
        return self.log_prob_differences(asked, samples, temperature).max().item()

    @torch.no_grad()
    def log_prob_differences(self, asked, samples, temperature):
        """Absolute differences of all tokens."""
        batch = Batch(
            [Group(p, [Response(s.ids, 0.0, s.logprobs) for s in g]) for p, g in zip(asked, samples, strict=True)]
        )
        (micro,) = batch.micro_batches(range(len(asked)), 10**6)
        want = log_probs(self.model, micro, batch.ids[micro.tokens], temperature)
        return (batch.rollout_logp[micro.tokens] - want).abs()


def processes(text):
    """Ids of all processes whose command line or environment names `text`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text.encode() in words and state != "Z" and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def shared_memory():
    """What lies in shared memory that an engine or we may have made."""
    names = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
    return {name for name in names if name.startswith(("prime-trainer-", "psm_", "sem.mp-"))}


def rows(run, stage="rl"):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage]


def same_weights(one, other):
    from safetensors.torch import load_file

    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
