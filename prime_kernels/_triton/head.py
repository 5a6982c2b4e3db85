"""Launches of the product of a head with the softmax in its epilogue; _tiled_head decides where they are used."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prime_kernels._backends import LinearHead, RowResults
from prime_kernels._layout import column, is_rows, row_stride
from prime_kernels._triton._head_kernels import blocks_kernel, product_kernel
from prime_kernels._triton._launch import device_of, on_device
from prime_kernels._triton._launch_config import HEAD_CONFIGS, HeadConfig, power_of_two_from

ALIGNED_COLUMNS, ALIGNED_BYTES = 8, 16
# Maximum, sum, weighted sum and the target's logit of a row in a tile.
FIELDS = 4
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


def token_log_probs(
    head: LinearHead, with_entropy: bool, config: HeadConfig | int, logits: Tensor | None = None
) -> RowResults:
    """Results [N] of a head; its float32 logits [N, V] to ``logits`` if it is given."""
    (rows, _), vocabulary = head.hidden.shape, len(head.weight)
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    blocks = -(-vocabulary // config.block_columns)
    most_blocks = power_of_two_from(blocks)
    logp, lse = (head.hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    partial = head.hidden.new_empty(FIELDS, rows, blocks, dtype=torch.float32)
    # Of ids outside the logp is meaningless, the lse is not: a column must be left out for them, too.
    ids = column(head.ids.clamp(0, vocabulary - 1), torch.int64, rows, head.hidden.device)
    _launch(head, ids, partial, logits, config, SCORED=True, ENTROPY=with_entropy)
    with on_device(head.hidden.device):
        blocks_kernel[(rows,)](
            partial,
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
    return RowResults(logp, lse, entropy)


def logits(head: LinearHead, out: Tensor, config: HeadConfig | int) -> None:
    """The logits of :func:`token_log_probs` alone, with its bits."""
    config = HEAD_CONFIGS[config] if isinstance(config, int) else config
    _launch(head, None, None, out, config, SCORED=False, ENTROPY=False)


def _launch(
    head: LinearHead,
    ids: Tensor | None,
    partial: Tensor | None,
    logits: Tensor | None,
    config: HeadConfig,
    **options: bool,
) -> None:
    (rows, width), vocabulary = head.hidden.shape, len(head.weight)
    assert supported(head)
    if logits is not None:
        assert logits.dtype == torch.float32 and is_rows(logits) and row_stride(logits) % ALIGNED_COLUMNS == 0
    # Unused arguments repeat an existing tensor; the kernel does not read them.
    other = next(each for each in (partial, logits) if each is not None)
    tiles = -(-rows // config.block_rows) * -(-vocabulary // config.block_columns)
    programs = min(tiles, config.programs * device_of(head.hidden.device).multiprocessors)
    with on_device(head.hidden.device):
        product_kernel[(programs,)](
            TensorDescriptor.from_tensor(head.hidden, [config.block_rows, config.block_width]),
            TensorDescriptor.from_tensor(head.weight, [config.block_columns, config.block_width]),
            other if head.bias is None else head.bias.contiguous(),
            other if ids is None else ids,
            1.0 / head.temperature,
            other if partial is None else partial,
            other if logits is None else logits,
            0 if logits is None else row_stride(logits) // ALIGNED_COLUMNS,
            rows,
            vocabulary,
            width,
            BIAS=head.bias is not None,
            KEPT=logits is not None,
            GROUP=config.group,
            PROGRAMS=programs,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK_WIDTH=config.block_width,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **options,
        )
