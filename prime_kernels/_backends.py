"""What a backend has to implement, and where each backend does.

Row kernels take rows of logits, packed kernels take packed tokens. A backend implements each group as a module or
an object with the functions of the protocol, imported on first use.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RowResults(NamedTuple):
    """Results of rows of logits: float32, or float64 for float64 logits; of one or several models."""

    logp: Tensor
    """Log-probability of each row's target, in nats."""
    lse: Tensor
    """logsumexp of logits / temperature."""
    entropy: Tensor | None
    """Entropy of each row's distribution, in nats; None where it was not asked for."""

    def only_model(self) -> "RowResults":
        """Results [N] of the only model of [1, N]."""
        return RowResults(self.logp[0], self.lse[0], None if self.entropy is None else self.entropy[0])

    @staticmethod
    def cat(parts: "Sequence[RowResults]", dim: int) -> "RowResults":
        """Results of consecutive rows or models as one."""
        entropies = [part.entropy for part in parts if part.entropy is not None]
        return RowResults(
            torch.cat([part.logp for part in parts], dim),
            torch.cat([part.lse for part in parts], dim),
            torch.cat(entropies, dim) if entropies else None,
        )


class RowGradient(NamedTuple):
    """What the gradient of rows of logits [N, V] is computed from, each [N] or None for zero."""

    lse: Tensor
    """logsumexp of logits / temperature, as in :class:`RowResults`."""
    entropy: Tensor | None
    """As in :class:`RowResults`; needed where ``grad_entropy`` is given."""
    grad_logp: Tensor | None
    """d loss / d logp."""
    grad_entropy: Tensor | None
    """d loss / d entropy."""

    def rows(self, at: slice | Tensor) -> "RowGradient":
        """That of some of the rows."""
        entropy, grad_logp, grad_entropy = (None if column is None else column[at] for column in self[1:])
        return RowGradient(self.lse[at], entropy, grad_logp, grad_entropy)

    def flat(self) -> "RowGradient":
        """In one dimension; without the entropy if it is not needed."""
        grad_logp, grad_entropy = (None if column is None else column.reshape(-1) for column in self[2:])
        entropy = None if self.entropy is None or grad_entropy is None else self.entropy.reshape(-1)
        return RowGradient(self.lse.reshape(-1), entropy, grad_logp, grad_entropy)


class LinearHead(NamedTuple):
    """Tokens and the output layer that makes their logits: hidden @ weight.T + bias, divided by the temperature."""

    hidden: Tensor
    """[N, D]."""
    weight: Tensor
    """[V, D], the dtype of ``hidden``."""
    bias: Tensor | None
    """[V], the dtype of ``hidden``."""
    ids: Tensor
    """[N] or [N, K] int64. Of one outside [0, V) the log-probability is meaningless."""
    temperature: float
    rounded: bool
    """Whether logits are rounded to the dtype of ``hidden``, as the model's own layer does; else they are float32."""
    softcap: float | None = None
    """c in c * tanh(logits / c), which the temperature divides; None for no cap."""


class HeadGradients(NamedTuple):
    """Gradients of an output layer and its input; None where not wanted."""

    hidden: Tensor | None
    """[N, D]."""
    weight: Tensor | None
    """[V, D]."""
    bias: Tensor | None
    """[V]."""


class RowCandidates(NamedTuple):
    """Log-probs of rows of logits, and their most probable tokens."""

    logp: Tensor
    """[N], as in :class:`RowResults`."""
    lse: Tensor
    """[N]."""
    found_ids: Tensor
    """[N, slots] int64: ascending, -1 where there are none."""
    found: Tensor
    """[N, slots]: their logits, -inf where there are none."""


class GradientKernel(Protocol):
    """The gradient of rows of logits."""

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
        """Write d loss / d logits [N, V] to ``out``, which may be ``logits`` itself.

        ``out`` has the dtype of the logits or, for float32 logits, one of 16 bits: what is written there is bit for bit
        the float32 gradient after ``.to(out.dtype)``.

        With ``partial`` these are some columns of longer rows: lse and entropy are those of the whole row, and ids may
        lie outside the columns.
        """
        ...


class RowKernels(GradientKernel, Protocol):
    """Kernels over rows of logits. Shapes, dtypes and ranges have been checked."""

    def token_log_probs(
        self,
        models: Sequence[Tensor],
        ids: Tensor,
        mask: Tensor | None,
        temperatures: Sequence[float],
        with_entropy: bool,
    ) -> RowResults:
        """Results [models, N] of one to three models' logits [N, V], which share ids and mask. Masked rows are 0."""
        ...

    def token_candidates(
        self,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        temperature: float,
        log_min_prob: float,
        slots: int,
    ) -> RowCandidates:
        """Results of one model's logits, and its tokens with log p >= log_min_prob, within 1e-5; masked rows have none.

        ``slots`` is more than a row can have.
        """
        ...


class HeadKernels(Protocol):
    """Kernels over tokens and an output layer. Shapes, dtypes and ranges have been checked."""

    def token_log_probs(
        self, head: LinearHead, with_entropy: bool, keep: bool = False
    ) -> tuple[RowResults, Tensor | None]:
        """Results, and with ``keep`` the logits. The bits depend on neither option, nor on other tokens.

        Of ids [N, K] so is logp; the first one's has the bits that it has alone.
        """
        ...

    def token_candidates(self, head: LinearHead, log_min_prob: float, slots: int) -> RowCandidates:
        """As that of :class:`RowKernels`, with logp in the bits of :meth:`token_log_probs`."""
        ...

    def logits(self, head: LinearHead) -> Tensor:
        """All logits [N, V], float32: capped, not divided by the temperature."""
        ...

    def gradients(
        self, head: LinearHead, gradient: RowGradient, wanted: Sequence[bool], kept: Tensor | None = None
    ) -> HeadGradients:
        """Gradients where ``wanted``, from the logits that the forward kept, or from new ones."""
        ...


class RlooBatch(NamedTuple):
    """Packed rewards and outcomes of a batch."""

    process_rewards: Tensor | None
    """[T] float32, or None for outcomes alone."""
    reward_mask: Tensor | None
    """[T] bool: the tokens that have a process reward; None for all."""
    outcomes: Tensor
    """[B] float64."""
    cu_seqlens: Tensor
    """[B + 1] int64."""
    cu_groups: Tensor
    """[G + 1] int64, counted in responses."""
    total: int
    """T."""


class RlooSettings(NamedTuple):
    """The options of :func:`prime_kernels.rloo_advantages` that are passed to kernels unchanged."""

    gamma_process: float
    gamma_outcome: float
    process_coef: float
    outcome_coef: float
    normalize_process: bool
    process_baseline: str


class PPOTokens(NamedTuple):
    """Tokens of a PPO loss, each [T]: float32, the mask bool."""

    logp: Tensor
    old_logp: Tensor
    advantages: Tensor
    weights: Tensor | None
    mask: Tensor | None


class ClipRange(NamedTuple):
    """Of the ratio: how far it may fall and rise, and what it counts for at most where the advantage is negative."""

    low: float
    high: float
    ceiling: float = math.inf


class PPOResults(NamedTuple):
    """Scalars: float32, ``scale`` float64."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    scale: Tensor
    """1 / denominator."""


class PRMBatch(NamedTuple):
    """Log-ratios and outcomes of a batch. Without groups the pair accuracy is NaN."""

    log_ratio: Tensor
    """[T] float32."""
    outcomes: Tensor
    """[B] float64."""
    cu_seqlens: Tensor
    """[B + 1] int64."""
    cu_groups: Tensor | None
    """[G + 1] int64, counted in responses."""
    weights: Tensor | None
    """[B] float64, or None for 1: factors of the responses' losses."""
    shift: Tensor | None
    """[B] float64, or None for 0: added to the responses' values."""


class PRMResults(NamedTuple):
    """Two float32 scalars and a slope."""

    loss: Tensor
    pair_accuracy: Tensor
    slope: Tensor
    """d loss / d (sum of a response's log-ratios), [B] float64; d loss / d (sum up to each token), [T] float32, for
    prefixes."""


class PackedKernels(Protocol):
    """Kernels over packed tokens. Shapes, dtypes and ranges have been checked; offsets are int64."""

    def scan_segments(
        self, values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool, factor: Tensor | None = None
    ) -> Tensor:
        """y_t = x_t + gamma * y_{t-1}, or y_{t+1} with ``reverse``, in each segment; float32 or float64 [T].

        The results are multiplied by ``factor``, a float32 scalar.
        """
        ...

    def sum_segments(self, values: Tensor, cu_segments: Tensor) -> Tensor:
        """The sum of each segment of float32 values [T]: [S] float64."""
        ...

    def fill_segments(self, values: Tensor, cu_segments: Tensor, total: int, factor: Tensor | None = None) -> Tensor:
        """[total] float32: each token gets its segment's value of [S] float64 times ``factor``, a float32 scalar."""
        ...

    def rloo_returns(
        self, batch: RlooBatch, settings: RlooSettings, over_ranks: Callable[[Tensor], None] | None
    ) -> tuple[Tensor, Tensor]:
        """Returns [T] float32, and moments [P, 3] float64 of P parts of them: count, mean, sum of squares about it.

        ``over_ranks`` replaces the largest suffix sum of this rank, a float64 scalar, by that of all ranks. It is
        called if process rewards are normalised, whether there are tokens here or not.
        """
        ...

    def whiten(self, values: Tensor, moments: Tensor) -> Tensor:
        """(value - mean) * rsqrt(unbiased variance + WHITEN_EPS) of the values of which these are the moments."""
        ...

    def ppo_loss_and_scale(self, tokens: PPOTokens, clip: ClipRange, denominator: Tensor | float | None) -> PPOResults:
        """The loss and its statistics; denominator None means the valid tokens."""
        ...

    def ppo_gradient(self, tokens: PPOTokens, clip: ClipRange, scale: Tensor, grad: Tensor) -> Tensor:
        """d loss / d logp * ``grad``, [T] float32; ``scale`` is that of the forward pass."""
        ...

    def prefix_loss_and_slope(self, batch: PRMBatch, beta: float, margin: float) -> PRMResults:
        """The loss of every prefix."""
        ...

    def pack_tokens(self, padded: Tensor, cu_seqlens: Tensor, total: int, pad_left: bool) -> Tensor:
        """Tokens [total, W] of padded rows [B, L, W]; with ``pad_left`` the padding comes first."""
        ...

    def unpack_tokens(self, values: Tensor, cu_seqlens: Tensor, length: int, pad_left: bool, fill: float) -> Tensor:
        """Padded rows [B, length, W] of tokens [N, W]."""
        ...


class GpuPackedKernels(PackedKernels, Protocol):
    """What a GPU backend has besides: on CPUs the loss of a few responses is plain PyTorch."""

    def checked_batch(self, batch: RlooBatch) -> RlooBatch:
        """The batch after assertions on the device about its values, in the types that ``rloo_returns`` takes.

        Offsets may be int32, rewards and outcomes of any floating-point type. The assertions, and the conversions in
        "triton", are one launch; their messages are those of :mod:`prime_kernels._checks`.
        """
        ...

    def prm_loss_and_slope(self, batch: PRMBatch, kind: str, beta: float) -> PRMResults:
        """The loss of whole responses. Weights and shift are given for PRM_BALANCED_KINDS only."""
        ...


def rows(backend: str) -> RowKernels:
    """The row kernels of a resolved backend."""
    if backend == "triton":
        from prime_kernels._triton import rows as triton_rows

        return triton_rows
    if backend == "eager":
        from prime_kernels._eager import rows as eager_rows

        return eager_rows
    from prime_kernels._native import rows as native_rows

    return native_rows


def empty_like(tensor: Tensor, backend: str) -> Tensor:
    """Uninitialised and dense, for results of the row kernels of a resolved backend."""
    if backend != "cpu":
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)
    from prime_kernels import _native

    return _native.empty(tensor.dtype, *tensor.shape)


def head(backend: str) -> HeadKernels:
    """The kernels for whole heads; "cpu" alone has them, the others go by tiles (ops/_tiled_head.py)."""
    assert backend == "cpu"
    from prime_kernels._native import head as native_head

    return native_head


def packed(backend: str) -> PackedKernels:
    """The packed kernels of a resolved backend other than "eager", which is plain PyTorch in ops/."""
    if backend == "cpu":
        from prime_kernels._native import packed as native_packed

        return native_packed.CPU
    return packed_on_gpu(backend)


def packed_on_gpu(backend: str) -> GpuPackedKernels:
    """The packed kernels of "triton" or "cuda"."""
    if backend == "triton":
        from prime_kernels._triton import packed as triton_packed

        return triton_packed
    from prime_kernels._native import packed as native_packed

    return native_packed.CUDA
