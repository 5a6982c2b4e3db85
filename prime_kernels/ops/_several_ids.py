"""Several ids a row: log-probs [N, K] of ids [N, K] from one pass over logits [N, V] or the tiles of a head.

Kernels of whole heads take all ids. Those of rows score the first id and give the row's lse; the others are
z[id] / temperature - lse, with logits gathered from the tile that the kernels have just read. With upstream gradients
g [N, K] and G = sum_k g_k

    d loss / d z_v = (sum_{k: id_k = v} g_k - G p_v) / temperature,

where the row kernels write -G p and what remains is set at the ids alone.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from prime_kernels import _backends
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import LinearHead, RowGradient, RowResults
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops._softcap import row_kernels


class Search(NamedTuple):
    """Tokens to find beside the scored ones."""

    min_prob: float
    """Of the whole vocabulary."""
    slots: int
    """More than a row can have."""

    @property
    def log_min(self) -> float:
        """In nats."""
        return math.log(self.min_prob)


class Rows(NamedTuple):
    """Results of rows of logits."""

    logp: Tensor
    """[N, K]."""
    lse: Tensor
    """[N]."""
    entropy: Tensor | None
    """[N] or None."""
    found_ids: Tensor | None
    """[N, P], ascending with -1 in between, or None without a search: all with a probability of at least min_prob."""
    found: Tensor | None
    """[N, P]: their logits."""

    @staticmethod
    def cat(parts: "Sequence[Rows]") -> "Rows":
        """Consecutive rows as one."""
        columns = zip(*parts, strict=True)
        return Rows(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]


def of_all_ids(
    results: RowResults, own: Tensor, mask: Tensor | None, temperature: float, softcap: float | None
) -> Tensor:
    """logp [N, K] from the first id's and the ids' logits [N, K]; 0 in masked rows."""
    logp = (_capped(own, softcap) / temperature - results.lse.double().unsqueeze(1)).to(results.logp.dtype)
    logp[:, 0] = results.logp
    return logp if mask is None else logp.masked_fill_(~mask.unsqueeze(1), 0.0)


def _capped(own: Tensor, softcap: float | None) -> Tensor:
    """In float64."""
    return own.double() if softcap is None else softcap * torch.tanh(own.double() / softcap)


def rows_of_head(
    head: LinearHead, with_entropy: bool, backend: str, search: Search | None = None, kept: Tensor | None = None
) -> Rows:
    """Results of a head with ids [N, K], by the tiles of _tiled_head; all logits [N, V] to ``kept`` if it is given.

    A token's probability among those of its tile is at least that among all, so what is found in the tiles has all
    that the whole row has.
    """
    ids, temperature, softcap = head.ids, head.temperature, head.softcap
    kernels = row_kernels(backend, softcap)
    tiled = tiles.Tiles.forward(head)
    last = -(-len(head.weight) // tiled.columns) - 1
    blocks = []
    for tokens in tiled.token_spans():
        parts, found_ids, found = [], [], []
        own: Tensor | None = None
        for columns in tiled.column_spans():
            z = tiled.logits(tokens, columns, None if kept is None else kept[tokens, columns])
            places = ids[tokens] - columns.start
            inside = (places >= 0) & (places < z.shape[1])
            places = places.clamp(0, z.shape[1] - 1)
            first = places[:, 0].contiguous()
            if search is None:
                parts.append(kernels.token_log_probs([z], first, None, [temperature], with_entropy).only_model())
            else:
                rows = kernels.token_candidates(z, first, None, temperature, search.log_min, search.slots)
                parts.append(RowResults(rows.logp, rows.lse, None))
                found_ids.append(torch.where(rows.found_ids < 0, -1, rows.found_ids + columns.start))
                found.append(rows.found)
            here = z.gather(1, places)
            own = here if own is None else here.where(inside, own)
        assert own is not None
        joined = tiles.join(parts, (ids[tokens][:, 0] // tiled.columns).clamp(0, last))
        searched = (torch.cat(found_ids, 1), torch.cat(found, 1)) if found else (None, None)
        blocks.append(Rows(of_all_ids(joined, own, None, temperature, softcap), joined.lse, joined.entropy, *searched))
    return Rows.cat(blocks)


class SeveralIds:
    """The row kernels of a backend for gradients of ids [N, K]; ids outside the logits belong to other parts."""

    def __init__(self, backend: str, softcap: float | None) -> None:
        self.kernels, self.softcap = row_kernels(backend, softcap), softcap

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
        """Write d loss / d logits [N, V] to ``out``, which may be ``logits`` itself; ``grad_logp`` is [N, K]."""
        lse, entropy, grad_logp, grad_entropy = gradient
        nowhere = torch.full_like(ids[:, 0], -1).contiguous()
        if grad_logp is None:
            self.kernels.logits_gradient(logits, nowhere, mask, gradient, temperature, out, partial=True)
            return
        inside = (ids >= 0) & (ids < logits.shape[1])
        at = ids.clamp(0, logits.shape[1] - 1)
        # Before the logits are overwritten.
        own = _capped(logits.gather(1, at), self.softcap)
        log_p = own / temperature - lse.double().unsqueeze(1)
        upstream = grad_logp.double()
        total = upstream.sum(1, keepdim=True)
        together = gradient._replace(grad_logp=total.squeeze(1).to(grad_logp.dtype))
        self.kernels.logits_gradient(logits, nowhere, mask, together, temperature, out, partial=True)
        # An id that comes several times has the sum of its gradients, which each of its places writes.
        same = ids.unsqueeze(2) == ids.unsqueeze(1)
        summed = upstream.unsqueeze(1).where(same, 0.0).sum(2)
        # expm1: where p is near 1, g - g p has no digits left.
        values = (summed - total) - total * torch.expm1(log_p)
        if grad_entropy is not None and entropy is not None:
            finite = log_p.masked_fill(log_p == -torch.inf, 0.0)
            values = values - grad_entropy.double().unsqueeze(1) * log_p.exp() * (
                finite + entropy.double().unsqueeze(1)
            )
        if self.softcap is not None:
            values = values * (1.0 - (own / self.softcap).square())
        values = (values / temperature).to(out.dtype)
        if mask is not None:
            values = values.masked_fill(~mask.unsqueeze(1), 0.0)
        # Places of ids outside repeat one inside, or what is there already.
        first = inside.int().argmax(1, keepdim=True)
        at = at.where(inside, at.gather(1, first))
        values = values.where(inside, values.gather(1, first))
        out.scatter_(1, at, values.where(inside.any(1, keepdim=True), out.gather(1, at)))


class LogitsLogProbs(torch.autograd.Function):
    """log_probs of ids [N, K] and logits [N, V] on a backend."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        temperature: float,
        softcap: float | None,
        with_entropy: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor | None]:
        kernels, first = row_kernels(backend, softcap), ids[:, 0].contiguous()
        results = kernels.token_log_probs([logits], first, mask, [temperature], with_entropy).only_model()
        logp = of_all_ids(results, logits.gather(1, ids), mask, temperature, softcap)
        ctx.save_for_backward(logits, ids, mask, results.lse, results.entropy)
        ctx.temperature, ctx.softcap, ctx.backend = temperature, softcap, backend
        ctx.set_materialize_grads(False)
        return logp, results.entropy

    @staticmethod
    @first_derivative_only("log_probs")
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
        logits, ids, mask, lse, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 7
        if mask is not None:
            grad_logp = None if grad_logp is None else grad_logp.masked_fill(~mask.unsqueeze(1), 0.0)
        out = _backends.empty_like(logits, ctx.backend)
        gradient = RowGradient(lse, None if grad_entropy is None else entropy, grad_logp, grad_entropy)
        SeveralIds(ctx.backend, ctx.softcap).logits_gradient(logits, ids, mask, gradient, ctx.temperature, out)
        return out, None, None, None, None, None, None


class HeadLogProbs(torch.autograd.Function):
    """linear_log_probs of ids [N, K] and hidden states [N, D] on a backend without kernels of whole heads."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        product: tuple[float, bool, float | None],
        with_entropy: bool,
        backend: str,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """``product`` is (temperature, rounded, softcap) of a LinearHead."""
        head = LinearHead(hidden, weight, bias, ids, *product)
        keep = with_gradient and any(ctx.needs_input_grad) and tiles.can_keep(head, backend)
        kept = tiles.empty_logits(head) if keep else None
        rows = rows_of_head(head, with_entropy, backend, kept=kept)
        ctx.save_for_backward(hidden, weight, bias, ids, rows.lse, rows.entropy, *([] if kept is None else [kept]))
        ctx.product, ctx.backend, ctx.spent = product, backend, False
        ctx.set_materialize_grads(False)
        return rows.logp, rows.entropy

    @staticmethod
    @first_derivative_only("linear_log_probs")
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
        hidden, weight, bias, ids, lse, entropy, *kept = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 8
        gradient = RowGradient(lse, None if grad_entropy is None else entropy, grad_logp, grad_entropy)
        head = LinearHead(hidden, weight, bias, ids, *ctx.product)
        kernels = SeveralIds(ctx.backend, head.softcap)
        wanted, kept = ctx.needs_input_grad[:3], tiles.spent(ctx, tuple(kept))
        gradients = tiles.head_gradients(head, gradient, wanted, ctx.backend, kept, kernels)
        return *gradients, None, None, None, None, None
