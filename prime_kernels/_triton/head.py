"""Launches of the product of a head with the softmax in its epilogue; _tiled_head decides where they are used."""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prime_kernels._backends import LinearHead, RowGradient, RowResults
from prime_kernels._layout import column, is_rows, row_stride
from prime_kernels._triton._head_kernels import blocks_kernel, gradient_kernel, product_kernel
from prime_kernels._triton._launch import device_of, on_device
from prime_kernels._triton._launch_config import HEAD_CONFIGS, HeadConfig, choose, power_of_two_from

ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# Sum, weighted sum and the target's logit of a row in a tile, beside its maximum.
FIELDS = 3
# Of a row's tiles, so that a thread holds eight.
BLOCKS_PER_WARP = 256


def supported(head: LinearHead) -> bool:
    """Whether the kernel can make these logits: of 16-bit inputs that bulk copies can read, neither rounded nor capped.

    Bulk copies read rows at multiples of 16 bytes, on GPUs of compute capability 9.0 and above.
    """
    return (
        head.hidden.dtype in (torch.bfloat16, torch.float16)
        and not head.rounded
        and head.softcap is None
        and len(head.hidden) > 0
        and device_of(head.hidden.device).capability >= (9, 0)
        and all(
            x.stride(1) == 1
            and x.stride(0) >= x.shape[1]
            and x.stride(0) * x.element_size() % ALIGNED_BYTES == 0
            and x.data_ptr() % ALIGNED_BYTES == 0
            for x in (head.hidden, head.weight)
        )
    )


class Probabilities(NamedTuple):
    """What the gradient of a bfloat16 head is made of, as _head_kernels.py has it."""

    q: Tensor
    """[N, V] float16."""
    highest: Tensor
    """[N, tiles] float32: the maximum of each row in a tile, without its target."""

    def of(self, tokens: slice, columns: slice, block_columns: int) -> "Probabilities":
        """A part whose columns start at a tile."""
        tiles = slice(columns.start // block_columns, -(-columns.stop // block_columns))
        return Probabilities(self.q[tokens, columns], self.highest[tokens, tiles])


def token_log_probs(
    head: LinearHead,
    with_entropy: bool,
    config: HeadConfig | int,
    logits: Tensor | None = None,
    q: Tensor | None = None,
) -> tuple[RowResults, Tensor]:
    """Results [N] of a head and the maxima of its tiles; float32 logits or q [N, V] to ``logits`` or ``q``.

    Of ids outside the head logp is meaningless, and q then lacks a column.
    """
    (rows, _), vocabulary = head.hidden.shape, len(head.weight)
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    blocks = -(-vocabulary // config.block_columns)
    most_blocks = power_of_two_from(blocks)
    logp, lse = (head.hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    highest = head.hidden.new_empty(rows, blocks, dtype=torch.float32)
    sums = head.hidden.new_empty(FIELDS, rows, blocks, dtype=torch.float32)
    # Of ids outside the logp is meaningless, the lse is not: a column must be left out for them, too.
    ids = column(head.ids.clamp(0, vocabulary - 1), torch.int64, rows, head.hidden.device)
    _launch(head, ids, highest, sums, logits, q, config, ENTROPY=with_entropy)
    with on_device(head.hidden.device):
        blocks_kernel[(rows,)](
            highest,
            sums,
            1.0 / head.temperature,
            logp,
            lse,
            lse if entropy is None else entropy,
            rows,
            blocks,
            ENTROPY=with_entropy,
            MOST_BLOCKS=most_blocks,
            num_warps=max(1, min(8, most_blocks // BLOCKS_PER_WARP)),
        )
    return RowResults(logp, lse, entropy), highest


def logits(head: LinearHead, out: Tensor, config: HeadConfig | int) -> None:
    """The logits of :func:`token_log_probs` alone, with its bits."""
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    _launch(head, None, None, None, out, None, config, ENTROPY=False)


def probabilities(head: LinearHead, q: Tensor, config: HeadConfig | int) -> Probabilities:
    """Those of :func:`token_log_probs` alone, with its bits where ``head`` starts at a tile; ids may lie outside."""
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    (rows, _), blocks = head.hidden.shape, -(-len(head.weight) // config.block_columns)
    highest = head.hidden.new_empty(rows, blocks, dtype=torch.float32)
    ids = column(head.ids, torch.int64, rows, head.hidden.device)
    _launch(head, ids, highest, None, None, q, config, ENTROPY=False)
    return Probabilities(q, highest)


def gradient(
    of: Probabilities, ids: Tensor, logp: Tensor, gradient: RowGradient, temperature: float, config: HeadConfig | int
) -> Tensor:
    """d loss / d logits [N, V] in bfloat16, in the memory of q, which is gone.

    These may be some columns of rows: logp and lse are those of whole rows, ids may lie outside the columns.
    """
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    (rows, vocabulary), device = of.q.shape, of.q.device
    _check_q(of.q, config)
    out = of.q.view(torch.bfloat16)
    lse, logp = column(gradient.lse, torch.float32, rows, device), column(logp, torch.float32, rows, device)
    entropy, grad_logp, grad_entropy = (column(each, torch.float32, rows, device) for each in gradient[1:])
    with_entropy = grad_entropy is not None
    loop = choose(rows, vocabulary, out.element_size(), device_of(device))
    tiles = max(1, loop.block // config.block_columns)
    loops = -(-vocabulary // (tiles * config.block_columns))
    with on_device(device):
        gradient_kernel[(rows, loop.splits)](
            of.q,
            out,
            row_stride(out) // ALIGNED_COLUMNS,
            of.highest,
            of.highest.stride(0),
            1.0 / temperature,
            column(ids, torch.int64, rows, device),
            logp,
            lse,
            entropy if with_entropy else lse,
            torch.zeros_like(lse) if grad_logp is None else grad_logp,
            grad_entropy if with_entropy else lse,
            vocabulary,
            -(-loops // loop.splits) * tiles * config.block_columns,
            ENTROPY=with_entropy,
            TILES=tiles,
            BLOCK_COLUMNS=config.block_columns,
            num_warps=loop.num_warps,
            num_stages=loop.num_stages,
        )
    return out


def _check_q(q: Tensor, config: HeadConfig) -> None:
    """Tiles of q are written and read whole, whatever the vocabulary: its rows have room for them."""
    assert q.dtype == torch.float16 and is_rows(q)
    assert row_stride(q) % config.block_columns == 0 or q.shape[1] % config.block_columns == 0


def _launch(
    head: LinearHead,
    ids: Tensor | None,
    highest: Tensor | None,
    sums: Tensor | None,
    logits: Tensor | None,
    q: Tensor | None,
    config: HeadConfig,
    **options: bool,
) -> None:
    (rows, width), vocabulary = head.hidden.shape, len(head.weight)
    assert supported(head) and (logits is None or q is None)
    out = logits if q is None else q
    if q is not None:
        _check_q(q, config)
    if out is not None:
        assert q is not None or out.dtype == torch.float32
        assert is_rows(out) and row_stride(out) % ALIGNED_COLUMNS == 0
    # Unused arguments repeat an existing tensor; the kernel does not read them.
    other = next(each for each in (sums, out) if each is not None)
    tiles = -(-rows // config.block_rows) * -(-vocabulary // config.block_columns)
    programs = min(tiles, config.programs * device_of(head.hidden.device).multiprocessors)
    with on_device(head.hidden.device):
        product_kernel[(programs,)](
            TensorDescriptor.from_tensor(head.hidden, [config.block_rows, config.block_width]),
            TensorDescriptor.from_tensor(head.weight, [config.block_columns, config.block_width]),
            other if head.bias is None else head.bias.contiguous(),
            other if ids is None else ids,
            1.0 / head.temperature,
            other if highest is None else highest,
            other if sums is None else sums,
            other if out is None else out,
            0 if out is None else row_stride(out) // ALIGNED_COLUMNS,
            rows,
            vocabulary,
            width,
            BIAS=head.bias is not None,
            SCORED=sums is not None,
            LOGITS=logits is not None,
            PROBABILITIES=q is not None,
            GROUP=config.group,
            PROGRAMS=programs,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK_WIDTH=config.block_width,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )
