"""Log-probabilities straight from hidden states: the logits of all tokens never exist at once.

z = (hidden @ weight.T + bias) / temperature, then as in log_probs. Tokens go through in chunks; backward computes the
logits of a chunk again instead of keeping them, so memory is one chunk of float32 logits, the head in float32 and its
gradient.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from prime_kernels import _checks, _dispatch
from prime_kernels.ops import log_probs as rows
from prime_kernels.ops._segments import result_dtype
from prime_kernels.ops.log_ratios import LogRatios

# Logits alive at once: 2^24 float32 values are 64 MiB, enough rows for a product to run at full speed.
CHUNK_ELEMENTS = 2**24


class Head(NamedTuple):
    """A model's last hidden states [..., D] with its output layer: weight [V, D] and bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None


def reference(head: Head, ids: Tensor, mask: Tensor | None, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp, entropy) of each token, by chunks of valid tokens.

    Products are float32 even for bfloat16 inputs: logits rounded to 16 bits would drown the ratio of two close models.
    """
    dtype = result_dtype(head.hidden)
    # Converted once, outside the chunks, so that the gradient of the head is also summed in this dtype.
    weight, bias = head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype)

    def chunk_log_probs(hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return rows.reference(torch.nn.functional.linear(hidden.to(dtype), weight, bias), ids, None, temperature)

    hidden, flat_ids = head.hidden.reshape(-1, head.hidden.shape[-1]), ids.reshape(-1)
    valid = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if valid is not None:
        hidden, flat_ids = hidden[valid], flat_ids[valid]
    size = max(1, CHUNK_ELEMENTS // weight.shape[0])
    pieces = [
        checkpoint(chunk_log_probs, *piece, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(hidden.split(size), flat_ids.split(size), strict=True)
    ]
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    if valid is not None:
        columns = [column.new_zeros(ids.numel()).index_put((valid,), column) for column in columns]
    return columns[0].view(ids.shape), columns[1].view(ids.shape)


class _Tiled(torch.autograd.Function):
    """Library product for a tile of tokens into one buffer, the extension's row kernel on it while it is in cache.

    The product has the dtype of the inputs, as the model's own forward pass has it; the softmax is float32. Backward
    computes the tile again and turns it into its own gradient in place, so that one tile is all the memory there is.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        temperature: float,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from prime_kernels import _native

        tiles = _tiles(hidden, weight, bias)
        parts = [_native.forward([z], ids[span], None, [temperature], with_entropy) for span, z in tiles]
        logp, lse, entropy = (
            None if column[0] is None else torch.cat(column, 1)[0] for column in zip(*parts, strict=True)
        )
        ctx.save_for_backward(hidden, weight, bias, ids, lse, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        from prime_kernels import _native

        hidden, weight, bias, ids, lse, entropy = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        wanted = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        # Sums over tiles are float32: in bfloat16 a long batch would stop counting.
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32) if bias is not None and wanted[2] else None
        for span, z in _tiles(hidden, weight, bias):
            _native.backward(
                z,
                ids[span],
                None,
                lse[span],
                None if entropy is None else entropy[span],
                None if grad_logp is None else grad_logp[span],
                None if grad_entropy is None else grad_entropy[span],
                ctx.temperature,
                z,
            )
            if grad_hidden is not None:
                torch.mm(z, weight, out=grad_hidden[span])
            if grad_weight is not None:
                grad_weight += z.T @ hidden[span]
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=torch.float32)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(bias.dtype), None, None, None


def _tiles(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """(tokens, their logits) tile by tile, all in the same buffer."""
    size = min(len(hidden), max(1, CHUNK_ELEMENTS // weight.shape[0]))
    buffer = hidden.new_empty(size, weight.shape[0])
    for start in range(0, len(hidden), size):
        span = slice(start, min(start + size, len(hidden)))
        z = buffer[: span.stop - start]
        if bias is None:
            torch.mm(hidden[span], weight.T, out=z)
        else:
            torch.addmm(bias, hidden[span], weight.T, out=z)
        yield span, z


def _run(
    head: Head, ids: Tensor, mask: Tensor | None, temperature: float, with_entropy: bool, backend: str
) -> tuple[Tensor, Tensor | None]:
    if backend == "eager" or ids.numel() == 0:
        return reference(head, ids, mask, temperature)
    hidden, flat_ids = head.hidden.reshape(-1, head.hidden.shape[-1]), ids.reshape(-1)
    valid = None if mask is None else mask.reshape(-1).nonzero().squeeze(-1)
    if valid is not None:
        if not len(valid):
            return reference(head, ids, mask, temperature)
        hidden, flat_ids = hidden[valid], flat_ids[valid]
    logp, entropy = _Tiled.apply(hidden, head.weight, head.bias, flat_ids, temperature, with_entropy)
    columns = [logp, entropy]
    if valid is not None:
        columns = [None if c is None else c.new_zeros(ids.numel()).index_put((valid,), c) for c in columns]
    return tuple(None if column is None else column.view(ids.shape) for column in columns)


def _check_head(head: Head, ids: Tensor, mask: Tensor | None, prefix: str) -> Tensor:
    """Check one head against the tokens; the labels as log_probs wants them."""
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
    return rows.check_arguments(head.hidden, ids, mask, name=hidden, vocabulary=vocabulary)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of each token from hidden states and an output layer, without ever holding all logits.

    As ``log_probs(hidden @ weight.T + bias, ids, ...)``. "eager" keeps the product in float32 whatever the inputs;
    "cpu" has it in their dtype, as the model's own forward pass does, and the softmax in float32.
    Differentiable in ``hidden``, ``weight`` and ``bias``.

    Args:
        hidden: [..., D], float32, bfloat16 or float16 (float64 on "eager").
        weight: [V, D], the dtype of ``hidden``.
        ids: [...], int32 or int64, in [0, V).
        bias: [V], the dtype of ``hidden``, or None.
        mask: [...], bool, or None for all. Where False the results are exactly 0, nothing is read and nothing is
            computed. "eager" waits for the device once to count valid tokens.
        temperature: above 0, divides the logits.
        with_entropy: also return the entropy, in nats.
        backend: see :mod:`prime_kernels`.

    Returns:
        logp [...], or (logp, entropy): float32, float64 for float64 inputs.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or temperature.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2502.01456, section 2; logits by chunks as in arXiv 2411.09009.
    """
    head = Head(hidden, weight, bias)
    ids = _check_head(head, ids, mask, "")
    temperature = rows.check_temperature("temperature", temperature)
    _checks.flag("with_entropy", with_entropy)
    backend = _dispatch.resolve("linear_log_probs", hidden, backend)
    logp, entropy = _run(head, ids, mask, temperature, with_entropy, backend)
    return (logp, entropy) if with_entropy else logp


def linear_log_ratios(
    prm: Head,
    ref: Head,
    ids: Tensor,
    *,
    policy: Head | None = None,
    mask: Tensor | None = None,
    policy_temperature: float = 1.0,
    backend: str | None = None,
) -> LogRatios:
    """:func:`prime_kernels.log_ratios` from hidden states and output layers, without ever holding all logits.

    Equal hidden states and heads give a log-ratio of exactly 0. Differentiable in every tensor of ``prm`` and
    ``policy``; the reference model gets no gradient. The models may have different widths D.

    Args:
        prm: Head of the process reward model.
        ref: Head of the reference model.
        ids: [...], int32 or int64, in [0, V) of every head.
        policy: Head of the policy, or None.
        mask: [...], bool, or None for all. Where False every result is exactly 0 and nothing is read.
        policy_temperature: above 0, divides the logits of the policy alone.
        backend: see :mod:`prime_kernels`.

    Returns:
        LogRatios of [...], float32 or float64; ``policy_logp`` is None without ``policy``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or temperature.
        IndexError: a label outside [0, V) where the mask is True.
        BackendUnavailable: the backend asked for cannot run this.

    Source: arXiv 2412.01981 and arXiv 2502.01456, section 2.
    """
    heads = {"prm": prm, "ref": ref} | ({} if policy is None else {"policy": policy})
    checked = {}
    for name, head in heads.items():
        if not isinstance(head, Head):
            raise TypeError(f"{name}: expected a Head, got {type(head).__name__}")
        checked[name] = _check_head(head, ids, mask, f"{name}.")
    policy_temperature = rows.check_temperature("policy_temperature", policy_temperature)
    # One for each head: they may differ in dtype, and float64 runs on "eager" alone.
    runs_on = {name: _dispatch.resolve("linear_log_ratios", head.hidden, backend) for name, head in heads.items()}
    prm_logp = _run(prm, checked["prm"], mask, 1.0, False, runs_on["prm"])[0]
    with torch.no_grad():
        ref_logp = _run(ref, checked["ref"], mask, 1.0, False, runs_on["ref"])[0]
    policy_logp = None
    if policy is not None:
        policy_logp = _run(policy, checked["policy"], mask, policy_temperature, False, runs_on["policy"])[0]
    return LogRatios(prm_logp - ref_logp, prm_logp, ref_logp, policy_logp)
