"""Log-probs of the frozen reference, computed once and kept on disk.

One file a batch, named by a hash of all that decides its numbers: the model's files and dtype, the tokenizer, the
token ids, and the size and attention of the forward passes. The last because a 16-bit product rounds differently in
another shape: with equal layouts a PRM that still equals its reference has log-ratios of exactly 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config.sections import ModelConfig
from ..data.groups import Group
from ..models import loading, tokenizers
from ..models.protocols import CausalLM, Tokenizer
from ..run.atomic_files import replacing
from ..run.progress import progress_bar
from ..train.batch import Batch
from ..train.forward import log_probs

FORMAT = "1"


class Reference:
    """`log_probs(groups)` [T] of the model that `cfg` names; it is loaded only when something is not in the cache, and
    not where it is in memory already."""

    def __init__(
        self,
        cfg: ModelConfig,
        tokenizer: Tokenizer,
        directory: Path,
        micro_batch_tokens: int,
        loaded: CausalLM | None = None,
    ) -> None:
        self._loaded = loaded
        self._cfg, self._directory, self._micro_batch_tokens = cfg, directory, micro_batch_tokens
        words = [
            FORMAT,
            loading.fingerprint(cfg),
            str(loading.device(cfg).type),
            str(micro_batch_tokens),
            cfg.attention,
        ]
        words.append(json.dumps(tokenizers.TokenizerIdentity.of(tokenizer).key(), sort_keys=True))
        self._key = hashlib.sha256("\n".join(words).encode())

    def log_probs(self, batches: Sequence[Sequence[Group]]) -> list[Tensor]:
        """[T] float32 on the CPU of every batch, in packed order. Batches already computed are not computed again."""
        paths = [self._path(groups) for groups in batches]
        missing = [k for k, path in enumerate(paths) if not path.is_file()]
        if missing:
            self._directory.mkdir(parents=True, exist_ok=True)
            model = self._loaded or loading.frozen(loading.load_model(self._cfg))
            with progress_bar("reference", len(paths), len(paths) - len(missing)) as bar:
                for k in missing:
                    _save(self._compute(model, batches[k]), paths[k])
                    bar.advance()
        return [_load(path) for path in paths]

    def _path(self, groups: Sequence[Group]) -> Path:
        key = self._key.copy()
        key.update(json.dumps([[g.prompt_ids, [r.ids for r in g.responses]] for g in groups]).encode())
        return self._directory / f"{key.hexdigest()}.safetensors"

    @torch.no_grad()
    def _compute(self, model: CausalLM, groups: Sequence[Group]) -> Tensor:
        batch = Batch.for_model(model, groups)
        out = torch.zeros(batch.num_tokens)
        for micro in batch.micro_batches(range(len(groups)), self._micro_batch_tokens):
            out[micro.tokens.cpu()] = log_probs(model, micro, batch.ids[micro.tokens]).cpu()
        return out


def _save(values: Tensor, path: Path) -> None:
    from safetensors.torch import save_file

    with replacing(path) as partial:
        save_file({"log_probs": values}, partial)


def _load(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["log_probs"]
    except (KeyError, SafetensorError) as error:
        raise ValueError(
            f"{path} holds no log-probs of a reference ({error}): remove it to have them computed"
        ) from None
