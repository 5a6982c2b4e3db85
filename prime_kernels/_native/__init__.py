"""The extension, seen from torch: tensors become addresses, sizes and strides in this folder and nowhere else.

Here the row kernels of log-probs; packed_cpu.py and packed_cuda.py have the token passes. CPU tensors run on the C++ kernels with as
many threads as torch has, CUDA tensors on the CUDA C++ kernels, on the current stream of their device. Callers have
checked shapes, dtypes and ranges; the assertions only guard memory.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from prime_kernels._layout import column, is_rows, mask_column, row_stride

try:
    from prime_kernels import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None
    _reason = f"the extension prime_kernels._C cannot be imported ({error}); build it with: pip install ."
else:
    _reason = None
    _DTYPES = {torch.float32: _C.FLOAT32, torch.bfloat16: _C.BFLOAT16, torch.float16: _C.FLOAT16}


def unavailable_reason() -> str | None:
    """None if the C++ kernels can be used, otherwise why not and what to do about it."""
    return _reason


def cuda_unavailable_reason() -> str | None:
    """None if the CUDA C++ kernels can be used, otherwise why not and what to do about it."""
    if _reason is not None:
        return _reason
    info = build_info()
    if not info["cuda"]:
        return (
            f"the extension was built without CUDA kernels ({info['cuda_detail']}); with nvcc on the path, build it "
            "with: PRIME_KERNELS_CUDA=ON pip install ."
        )
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def build_info() -> dict[str, str | bool]:
    """How the extension was built, and what runs: compiler, flags, openmp, cuda, cuda_detail (architectures, or why
    without) and cpu (the instruction set of the CPU kernels: avx512, avx2 or portable)."""
    return _C.build_info()


def forward(
    models: Sequence[Tensor],
    ids: Tensor,
    mask: Tensor | None,
    temperatures: Sequence[float],
    with_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(logp, lse, entropy or None), each [models, N] float32, of one to three models' [N, V] logits in one pass.

    lse is of logits / temperature. Masked rows are 0. The models may differ in dtype and row stride.
    """
    first, count = models[0], len(models)
    rows, vocabulary = first.shape
    assert all(is_rows(z) and z.shape == first.shape and z.device == first.device for z in models)
    ids, mask = column(ids, torch.int64, rows, first.device), mask_column(mask, rows, first.device)
    logp, lse = (torch.empty(count, rows, dtype=torch.float32, device=first.device) for _ in range(2))
    entropy = torch.empty_like(lse) if with_entropy else None
    results = zip(logp, lse, [None] * count if entropy is None else entropy, strict=True)
    fields = [
        (z.data_ptr(), row_stride(z), _DTYPES[z.dtype], temperature, *map(address, result))
        for z, temperature, result in zip(models, temperatures, results, strict=True)
    ]
    run("log_probs_forward", first.device, fields, ids.data_ptr(), address(mask), rows, vocabulary)
    return logp, lse, entropy


def backward(
    logits: Tensor,
    ids: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    out: Tensor,
    partial: bool = False,
) -> None:
    """Write d loss / d logits [N, V] to ``out``, which may be ``logits`` itself. ``entropy`` is that of the forward.

    ``partial``: these are some of the columns of a row, with the lse and entropy of all, and ids may lie outside them.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    assert is_rows(logits) and is_rows(out) and out.device == device
    assert out.dtype == logits.dtype and out.shape == logits.shape
    ids, mask = column(ids, torch.int64, rows, device), mask_column(mask, rows, device)
    columns = [column(each, torch.float32, rows, device) for each in (lse, entropy, grad_logp, grad_entropy)]
    fields = (logits.data_ptr(), row_stride(logits), _DTYPES[logits.dtype], temperature, ids.data_ptr(), address(mask))
    addresses = [address(each) for each in columns]
    run("log_probs_backward", device, *fields, rows, vocabulary, *addresses, out.data_ptr(), row_stride(out), partial)


def token_passes(backend: str) -> ModuleType:
    """packed_cpu.py or packed_cuda.py."""
    from prime_kernels._native import packed_cpu, packed_cuda

    return packed_cpu if backend == "cpu" else packed_cuda


def constant(name: str) -> int:
    """A number that the extension was built with."""
    return getattr(_C, name)


def run(name: str, device: torch.device, *fields: Any) -> Any:
    """Calls the kernel of that name for the device."""
    if device.type == "cpu":
        return getattr(_C, name)(*fields, torch.get_num_threads())
    # A launch goes to the current device, which need not be that of the tensors.
    with torch.cuda.device(device):
        return getattr(_C, f"cuda_{name}")(*fields, torch.cuda.current_stream(device).cuda_stream)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
