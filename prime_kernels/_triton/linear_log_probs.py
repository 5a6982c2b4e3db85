"""Launch of the fused product and softmax of linear_log_probs; see FUSED_LINEAR in _launch_config.py."""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prime_kernels._backends import RowResults
from prime_kernels._triton._launch import device_of, on_device
from prime_kernels._triton._launch_config import LinearConfig, choose_linear
from prime_kernels._triton._linear_kernels import linear_forward_kernel
from prime_kernels._triton._log_probs_kernels import combine_kernel
from prime_kernels._triton.rows import PARTIAL_FIELDS

ALIGNED_BYTES = 16


def supported(hidden: Tensor, weight: Tensor) -> bool:
    """Whether bulk copies can read the tensors: last stride 1, rows at multiples of 16 bytes."""
    return all(
        x.stride(1) == 1 and x.stride(0) * x.element_size() % ALIGNED_BYTES == 0 and x.data_ptr() % ALIGNED_BYTES == 0
        for x in (hidden, weight)
    )


def linear_token_log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    temperature: float,
    with_entropy: bool,
    config: LinearConfig | None = None,
) -> RowResults:
    """Results [N] of hidden states [N, D] and a head [V, D]."""
    rows, width = hidden.shape
    vocabulary = weight.shape[0]
    assert supported(hidden, weight) and rows > 0 and ids.shape == (rows,) and ids.dtype == torch.int64
    config = config or choose_linear(rows, vocabulary, hidden.element_size(), device_of(hidden.device))
    logp, lse = (hidden.new_empty(rows, dtype=torch.float32) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    partial = hidden.new_empty(PARTIAL_FIELDS, rows, config.splits, dtype=torch.float32)
    blocks = -(-vocabulary // config.block_columns)
    chunk = -(-blocks // config.splits) * config.block_columns
    ids, inverse = ids.contiguous(), 1.0 / temperature
    with on_device(hidden.device):
        linear_forward_kernel[(config.programs,)](
            TensorDescriptor.from_tensor(hidden, [config.block_rows, config.block_width]),
            TensorDescriptor.from_tensor(weight, [config.block_columns, config.block_width]),
            ids if bias is None else bias.contiguous(),
            ids,
            inverse,
            partial,
            rows,
            vocabulary,
            width,
            chunk,
            BIAS=bias is not None,
            ENTROPY=with_entropy,
            SPLITS=config.splits,
            PROGRAMS=config.programs,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK_WIDTH=config.block_width,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        combine_kernel[(rows, 1)](
            partial,
            *[inverse] * 3,
            ids,
            logp,
            lse,
            lse if entropy is None else entropy,
            rows,
            MODELS=1,
            MASKED=False,
            ENTROPY=with_entropy,
            SPLITS=config.splits,
            ONE_OWNER=True,
            num_warps=1,
        )
    return RowResults(logp, lse, entropy)
