"""Log-probabilities straight from hidden states: the logits of all tokens never exist at once.

z = cap(hidden @ weight.T + bias) / temperature, then as in log_probs. Kernels work as _tiled_head says. The
reference works on chunks of tokens and recomputes the logits of a chunk in backward: its memory is one chunk of float32
logits, the head in float32 and its gradient.
"""

import math
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prime_kernels import _checks, _dispatch
from prime_kernels._autograd import Gradients, first_derivative_only
from prime_kernels._backends import RowGradient, RowResults
from prime_kernels._segment_math import result_dtype
from prime_kernels.ops import _softcap
from prime_kernels.ops import _tiled_head as tiles
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops._fused_product import OfProbabilities
from prime_kernels.ops._several_ids import HeadLogProbs

# Logits alive at once: 2^24 float32 values are 64 MiB, enough rows for a product to run at full speed.
CHUNK_ELEMENTS = 2**24


class Head(NamedTuple):
    """A model's last hidden states [..., D] with its output layer: weight [V, D] and bias [V] or None.

    Its logits are cap(scale * (hidden @ weight.T + bias)), with cap(x) = softcap * tanh(x / softcap), or x for None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def as_product(head: Head, temperature: float) -> tuple[float, float | None]:
    """(temperature, softcap) with which the bare product has the head's logits, over ``temperature``."""
    return temperature / head.scale, None if head.softcap is None else head.softcap / head.scale


class Settings(NamedTuple):
    """How log-probs are made: checked options and the backend that runs them."""

    temperature: float
    softcap: float | None
    with_entropy: bool
    rounded: bool
    """logits_dtype "input"."""
    backend: str

    def of_product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> tiles.LinearHead:
        """The head of a bare product, whose logits these settings cap and divide."""
        return tiles.LinearHead(hidden, weight, bias, ids, self.temperature, self.rounded, self.softcap)


def reference(
    head: Head, ids: Tensor, mask: Tensor | None, temperature: float, rounded: bool = False
) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of each token, by chunks of valid tokens.

    Products are float32 even for bfloat16 inputs, unless logits are to be ``rounded`` as a layer of that dtype leaves
    them: rounding to 16 bits drowns the ratio of two close models.
    """
    dtype = head.hidden.dtype if rounded else result_dtype(head.hidden)
    temperature, softcap = as_product(head, temperature)
    # Converted once, outside the chunks: the gradient of the head is then also summed in this dtype.
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)

    def chunk_log_probs(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.to(dtype), weight, bias)
        return rows.reference(_softcap.reference(logits, softcap, None), ids, None, temperature)

    tokens = compact(head.hidden, ids, mask)
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    pieces = [
        checkpoint(chunk_log_probs, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(tokens.hidden.split(size), tokens.ids.split(size), strict=True)
    ]
    shape = head.hidden.shape[:-1]
    logp, entropy = (spread(torch.cat(column), tokens.places, shape) for column in zip(*pieces, strict=True))
    return logp, entropy


class TiledLogProbs(torch.autograd.Function):
    """Log-probabilities by the tiles of _tiled_head, over the whole vocabulary or this process's shard of it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        settings: Settings,
        group: dist.ProcessGroup | None,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        first = 0 if group is None else dist.get_rank(group) * len(weight)
        head = settings.of_product(hidden, weight, bias, ids - first)
        # Shards have ids outside, whose probability is another column's.
        columns = None if group is not None else tiles.gradient_columns(head, settings.backend)
        keep = with_gradient and any(ctx.needs_input_grad) and tiles.can_keep(head, settings.backend, columns)
        results, kept = tiles.head_log_probs(head, settings.with_entropy, settings.backend, keep, columns)
        if group is not None:
            results = _join_shards(results, ids // len(weight), group)
        logp = results.logp if columns else None
        ctx.save_for_backward(hidden, weight, bias, head.ids, results.lse, results.entropy, logp, *kept)
        ctx.settings, ctx.group, ctx.columns, ctx.spent = settings, group, columns, False
        ctx.set_materialize_grads(False)
        return results.logp, results.entropy

    @staticmethod
    @first_derivative_only("linear_log_probs")
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> Gradients:
        hidden, weight, bias, ids, lse, entropy, logp, *kept = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 7
        kept = tiles.spent(ctx, tuple(kept))
        upstream = (None if grad is None else grad.contiguous() for grad in (grad_logp, grad_entropy))
        gradient = RowGradient(lse, None if grad_entropy is None else entropy, *upstream)
        settings = ctx.settings
        head = settings.of_product(hidden, weight, bias, ids)
        of_tile = OfProbabilities(head, logp, gradient, ctx.columns, kept) if ctx.columns else None
        wanted = ctx.needs_input_grad[:3]
        gradients = tiles.head_gradients(head, gradient, wanted, settings.backend, kept, of_tile=of_tile)
        grad_hidden = gradients.hidden
        if ctx.group is not None and grad_hidden is not None:
            total = grad_hidden.float()
            dist.all_reduce(total, group=ctx.group)
            grad_hidden = total.to(hidden.dtype)
        return grad_hidden, gradients.weight, gradients.bias, None, None, None, None


def _join_shards(results: RowResults, owner: Tensor, group: dist.ProcessGroup) -> RowResults:
    """The softmax over all processes from that of each over its own rows of the head: one collective."""
    mine = torch.stack([column for column in results if column is not None])
    shards = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, mine, group=group)
    return tiles.join([RowResults(part[0], part[1], part[2] if len(part) > 2 else None) for part in shards], owner)


class ValidTokens(NamedTuple):
    """The tokens of a batch where the mask is True."""

    hidden: Tensor
    """[N, D]."""
    ids: Tensor
    """[N], or [N, K]."""
    places: Tensor | None
    """[N], positions in the flattened batch, or None if all tokens are valid."""


def compact(hidden: Tensor, ids: Tensor, mask: Tensor | None) -> ValidTokens:
    """The valid tokens of a batch [...]."""
    flat_ids = ids.reshape(-1, ids.shape[-1]) if ids.ndim == hidden.ndim else ids.reshape(-1)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if mask is None:
        return ValidTokens(hidden, flat_ids, None)
    valid = mask.reshape(-1).nonzero().squeeze(-1)
    return ValidTokens(hidden[valid], flat_ids[valid], valid)


def spread(column: Tensor, places: Tensor | None, shape: torch.Size) -> Tensor:
    """Values [N] or [N, K] of the valid tokens at their positions in a batch of this shape, 0 elsewhere."""
    if places is not None:
        column = column.new_zeros(shape.numel(), *column.shape[1:]).index_put((places,), column)
    return column.view(*shape, *column.shape[1:])


def check_head(
    head: Head, ids: Tensor, mask: Tensor | None, prefix: str, shards: int = 1, several: bool = False
) -> Tensor:
    """Check a head, or one of its equal shards, against the tokens. Returns the labels as log_probs wants them."""
    hidden, weight, bias = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    _checks.floating(hidden, head.hidden)
    if head.hidden.ndim == 0 or head.hidden.shape[-1] == 0:
        raise ValueError(f"{hidden}: expected shape [..., D] with D of at least 1, got {list(head.hidden.shape)}")
    _checks.floating(weight, head.weight, ndim=2)
    vocabulary = head.weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"{weight}: expected shape [V, D] with V of at least 1, got {list(head.weight.shape)}")
    _checks.shape(weight, head.weight, (vocabulary, head.hidden.shape[-1]), f"[V, D] with the D of {hidden}")
    _checks.device(weight, head.weight, head.hidden, hidden)
    _checks.tensor(weight, head.weight, (head.hidden.dtype,))
    if head.bias is not None:
        _checks.tensor(bias, head.bias, (head.hidden.dtype,), ndim=1)
        _checks.shape(bias, head.bias, (vocabulary,), f"[V] with the V of {weight}")
        _checks.device(bias, head.bias, head.hidden, hidden)
    _checks.number(f"{prefix}scale", head.scale, 0.0, math.inf, above_low=True)
    _softcap.check_softcap(f"{prefix}softcap", head.softcap)
    return rows.check_arguments(head.hidden, ids, mask, name=hidden, vocabulary=vocabulary * shards, several=several)


@overload
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: Literal[False] = ...,
    process_group: dist.ProcessGroup | None = ...,
    logits_dtype: str = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: Literal[True],
    process_group: dist.ProcessGroup | None = ...,
    logits_dtype: str = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    temperature: float = ...,
    softcap: float | None = ...,
    with_entropy: bool,
    process_group: dist.ProcessGroup | None = ...,
    logits_dtype: str = ...,
    backend: str | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
    process_group: dist.ProcessGroup | None = None,
    logits_dtype: str = "float32",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token from hidden states and an output layer, without ever holding all logits.

    As ``log_probs(hidden @ weight.T + bias, ids, ...)`` with the product in float32: operands are multiplied in their
    own dtype, their sums are never rounded to it. Scratch memory does not grow with N and V (on CPUs 16 MiB without
    gradients, elsewhere one tile of logits). If a gradient is wanted and all float32 logits take at most 256 MiB (on
    GPUs a sixteenth of all memory and a third of what is free), they are kept for it instead of recomputed: the same
    bits in three products for four. torch.compile recomputes. Differentiable in ``hidden``, ``weight`` and ``bias``.

    On "cpu" the log-prob and the entropy of a token have the same bits whatever else is in the call: other tokens,
    their number and order, padding, the number of threads, whether a gradient or an entropy is wanted. The bits depend
    on the processor's instruction set. Of ids [..., K] this holds for the first; the log-probs of the others agree with
    it within the rounding of float32. On other backends the products are a library's, whose rounding may change with
    the number of tokens in a call; equal calls give equal bits there.

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 on "eager").
        weight: [V, D], the dtype of ``hidden``.
        ids: [...], int32 or int64, in [0, V); or [..., K], K tokens of each position in the same pass, not with
            ``process_group``.
        bias: [V], the dtype of ``hidden``, or None.
        mask: [...], bool, or None for all. Where False the results are exactly 0, nothing is read and nothing is
            computed. "eager" waits for the device once to count valid tokens.
        temperature: above 0, divides the logits.
        softcap: above 0, caps the logits before the temperature as in :func:`prime_kernels.log_probs`, a tile at a
            time; None for no cap.
        with_entropy: also return the entropy, in nats.
        process_group: the processes that share the head, each with V / size rows of it in the order of their ranks
            (``weight`` and ``bias`` are this process's; pad with a bias of -inf, which ``softcap`` makes -softcap).
            Every process passes the same tokens and gets the same results and the same gradient of ``hidden``; that of
            ``weight`` is its own.
        logits_dtype: "float32", or "input" to round logits to the dtype of ``hidden`` before the softmax, as the
            model's own output layer does. For comparisons with such a model: a bfloat16 logit is off by up to 2^-9 of
            itself.
        backend: see :mod:`prime_kernels`.

    Returns:
        logp in the shape of ids, or (logp, entropy [...]): float32, float64 for float64 inputs.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, temperature or logits_dtype.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2502.01456, section 2; logits by chunks as in arXiv 2411.09009.
    """
    arguments = (hidden, weight, ids, bias, mask, temperature, softcap, with_entropy, logits_dtype, backend)
    # Several ids are plain PyTorch in a graph, as the reference has them.
    if torch.compiler.is_compiling() and process_group is None and ids.ndim != hidden.ndim:
        logp, _, entropy = torch.ops.prime_kernels.linear_log_probs(*arguments)
        return (logp, entropy) if with_entropy else logp
    head, ids, settings = check(*arguments, process_group, several=True)
    several, shape = ids.ndim == hidden.ndim, hidden.shape[:-1]
    if several and process_group is not None:
        raise ValueError(f"ids: expected shape {list(shape)} with process_group, got {list(ids.shape)}")
    tokens = None if settings.backend == "eager" and process_group is None else compact(head.hidden, ids, mask)
    if tokens is None or not len(tokens.hidden):
        logp, entropy = reference(head, ids, mask, settings.temperature, settings.rounded)
        return (logp, entropy) if with_entropy else logp
    columns = (tokens.hidden, head.weight, head.bias, tokens.ids)
    if several and settings.backend not in tiles.HEAD_KERNELS:
        product = (settings.temperature, settings.rounded, settings.softcap)
        logp, entropy = HeadLogProbs.apply(*columns, product, with_entropy, settings.backend, torch.is_grad_enabled())
    else:
        logp, entropy = TiledLogProbs.apply(*columns, settings, process_group, torch.is_grad_enabled())
    logp = spread(logp, tokens.places, shape)
    return (logp, spread(entropy, tokens.places, shape)) if with_entropy else logp


class Checked(NamedTuple):
    """Arguments that have passed every check."""

    head: Head
    ids: Tensor
    settings: Settings


def check(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    logits_dtype: str,
    backend: str | None,
    process_group: dist.ProcessGroup | None = None,
    operation: str = "linear_log_probs",
    several: bool = False,
) -> Checked:
    """Check the arguments of :func:`linear_log_probs`; parameters in shards are gathered."""
    head = whole_head(Head(hidden, weight, bias, softcap=softcap))
    shards = 1 if process_group is None else dist.get_world_size(process_group)
    ids = check_head(head, ids, mask, "", shards, several)
    temperature = rows.check_temperature("temperature", temperature)
    _checks.flag("with_entropy", with_entropy)
    rounded, chosen = check_logits_dtype(logits_dtype), _dispatch.resolve(operation, hidden, backend)
    return Checked(head, ids, Settings(temperature, head.softcap, with_entropy, rounded, chosen))


def check_logits_dtype(logits_dtype: str) -> bool:
    """Whether logits are rounded to the dtype of the inputs."""
    if logits_dtype not in ("float32", "input"):
        raise ValueError(f'logits_dtype: expected "float32" or "input", got {logits_dtype!r}')
    return logits_dtype == "input"


def whole_head(head: Head) -> Head:
    """The head with full parameters, where FSDP2 keeps them in shards."""
    return head._replace(weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))


def whole(parameter: Tensor) -> Tensor:
    """The full tensor of a parameter in shards (a DTensor); other tensors unchanged.

    As in FSDP2, the gradient of a process's own tokens is averaged over the processes and is sharded again.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    placements = [Partial("avg") if placement.is_shard() else placement for placement in parameter.placements]
    return parameter.full_tensor(grad_placements=placements)
