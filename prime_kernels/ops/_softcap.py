"""Capped logits: cap(z) = c * tanh(z / c) before the temperature, as Gemma 2 and nanochat have them.

The kernels of a backend take capped logits in float32. :class:`CappedRows` makes these for a block of rows at a time,
while they are in cache, and multiplies what the kernels give for their gradient by the slope 1 - (cap(z) / c)^2. Only
the logits themselves are kept for the gradient, so a cap costs no memory that grows with their number. Kernels for
whole heads (_native/head.py) cap by themselves.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prime_kernels import _backends, _checks
from prime_kernels._backends import RowCandidates, RowGradient, RowKernels, RowResults
from prime_kernels._segment_math import result_dtype

# Capped logits of one model alive at once: 4 MiB of float32 for a thread of a CPU; 128 MiB on a GPU, where a smaller
# block would leave multiprocessors idle at its end.
BLOCK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 25}


def check_softcap(name: str, softcap: float | None) -> float | None:
    """A finite number above 0, or None."""
    return None if softcap is None else _checks.number(name, softcap, 0.0, math.inf, above_low=True)


def reference(logits: Tensor, softcap: float | None, mask: Tensor | None) -> Tensor:
    """The capped logits [..., V] by PyTorch's own operations, float32 or float64; the logits for None.

    Rows where ``mask`` is False do not matter, and pass no gradient.
    """
    if softcap is None:
        return logits
    # What is not looked at must not reach the gradient as NaN.
    logits = logits if mask is None else logits.masked_fill(~mask.unsqueeze(-1), 0.0)
    return softcap * torch.tanh(logits.to(result_dtype(logits)) / softcap)


def row_kernels(backend: str, softcap: float | None) -> RowKernels:
    """The row kernels of a resolved backend, for capped logits unless ``softcap`` is None."""
    kernels = _backends.rows(backend)
    return kernels if softcap is None else CappedRows(kernels, softcap)


class CappedRows(NamedTuple):
    """Row kernels as :class:`prime_kernels._backends.RowKernels` has them, for logits that are capped first."""

    kernels: RowKernels
    softcap: float

    def token_log_probs(
        self,
        models: Sequence[Tensor],
        ids: Tensor,
        mask: Tensor | None,
        temperatures: Sequence[float],
        with_entropy: bool,
    ) -> RowResults:
        parts = []
        for rows in _blocks(models[0]):
            capped = [self._cap(z[rows]) for z in models]
            row_mask = None if mask is None else mask[rows]
            parts.append(self.kernels.token_log_probs(capped, ids[rows], row_mask, temperatures, with_entropy))
        return parts[0] if len(parts) == 1 else RowResults.cat(parts, 1)

    def token_candidates(
        self, logits: Tensor, ids: Tensor, mask: Tensor | None, temperature: float, log_min_prob: float, slots: int
    ) -> RowCandidates:
        parts = []
        for rows in _blocks(logits):
            row_mask = None if mask is None else mask[rows]
            columns = (self._cap(logits[rows]), ids[rows], row_mask)
            parts.append(self.kernels.token_candidates(*columns, temperature, log_min_prob, slots))
        return RowCandidates(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def logits_gradient(
        self,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        gradient: RowGradient,
        temperature: float,
        out: Tensor,
        partial: bool = False,
    ) -> None:
        for rows in _blocks(logits):
            values = self._cap(logits[rows])
            slope = torch.div(values, self.softcap).square_().neg_().add_(1.0)
            row_mask = None if mask is None else mask[rows]
            self.kernels.logits_gradient(
                values, ids[rows], row_mask, gradient.rows(rows), temperature, values, partial=partial
            )
            # A masked row may hold anything, NaN included; its gradient is 0.
            out[rows] = torch.where(values == 0.0, values, slope.mul_(values))

    def _cap(self, logits: Tensor) -> Tensor:
        """A capped copy in float32 or float64."""
        return logits.to(result_dtype(logits), copy=True).div_(self.softcap).tanh_().mul_(self.softcap)


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Slices that together cover the rows of logits [N, V], one at least."""
    count, vocabulary = logits.shape
    on_cpu = logits.device.type == "cpu"
    elements = BLOCK_ELEMENTS["cpu"] * torch.get_num_threads() if on_cpu else BLOCK_ELEMENTS["cuda"]
    step = max(1, elements // vocabulary)
    for start in range(0, max(1, count), step):
        yield slice(start, min(start + step, count))
