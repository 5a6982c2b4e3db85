"""The extension, seen from torch: tensors become addresses, sizes and strides here and nowhere else.

CPU tensors run on the C++ kernels with as many threads as torch has, CUDA tensors on the CUDA C++ kernels, on the
current stream of their device. Callers have checked shapes, dtypes and ranges; the assertions below only guard memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from prime_kernels._rows import column, is_rows, mask_column, row_stride

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
        (z.data_ptr(), row_stride(z), _DTYPES[z.dtype], temperature, *map(_address, result))
        for z, temperature, result in zip(models, temperatures, results, strict=True)
    ]
    _run("log_probs_forward", first.device, fields, ids.data_ptr(), _address(mask), rows, vocabulary)
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
    fields = (logits.data_ptr(), row_stride(logits), _DTYPES[logits.dtype], temperature, ids.data_ptr(), _address(mask))
    addresses = [_address(each) for each in columns]
    _run("log_probs_backward", device, *fields, rows, vocabulary, *addresses, out.data_ptr(), row_stride(out), partial)


def segment_scan(values: Tensor, cu_seqlens: Tensor, gamma: float, reverse: bool) -> Tensor:
    """y_t = x_t + gamma * y_{t-1} (y_{t+1} if ``reverse``) inside each segment of ``values``."""
    assert cu_seqlens.ndim == 1 and cu_seqlens.numel() > 0
    values = column(values, torch.float32, values.numel(), values.device)
    cu_seqlens = column(cu_seqlens, torch.int64, cu_seqlens.numel(), values.device)
    out = torch.empty_like(values)
    sizes = (cu_seqlens.numel() - 1, values.numel())
    fields = (values.data_ptr(), cu_seqlens.data_ptr(), *sizes, gamma, reverse, out.data_ptr())
    _run("segment_scan", values.device, *fields)
    return out


def segment_sum(values: Tensor, cu_segments: Tensor) -> Tensor:
    """The sum of each segment, [S] float64."""
    values, cu_segments = _packed(values, cu_segments)
    out = torch.empty(cu_segments.numel() - 1, dtype=torch.float64)
    _run("segment_sum", out.device, *_segments(values, cu_segments), out.data_ptr())
    return out


def segment_fill(values: Tensor, cu_segments: Tensor, total: int) -> Tensor:
    """Each token's segment's value, [total] float32 from [S] float64."""
    values = column(values, torch.float64, cu_segments.numel() - 1, values.device)
    out = torch.empty(total, dtype=torch.float32)
    _run("segment_fill", out.device, values.data_ptr(), cu_segments.data_ptr(), values.numel(), total, out.data_ptr())
    return out


def rloo_moments(rewards: Tensor, mask: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sum, count) of each response's rewards [B] and the largest |sum of a response's rewards from a token on| []."""
    rewards, cu_seqlens = _packed(rewards, cu_seqlens)
    mask = mask_column(mask, rewards.numel(), rewards.device)
    sums, counts = torch.empty(2, cu_seqlens.numel() - 1, dtype=torch.float64)
    largest = torch.empty((), dtype=torch.float64)
    sizes = (cu_seqlens.data_ptr(), sums.numel(), rewards.numel())
    results = (each.data_ptr() for each in (sums, counts, largest))
    _run("rloo_moments", sums.device, rewards.data_ptr(), _address(mask), *sizes, *results)
    return sums, counts, largest


def rloo_returns(
    rewards: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    total: int,
    scale: Tensor,
    shift: Tensor,
    outcomes: Tensor,
    gammas: tuple[float, float],
    coefs: tuple[float, float],
) -> tuple[Tensor, float]:
    """(returns [T] float32, their sum): of scale * rewards + shift, and of the outcomes on the last tokens."""
    responses = cu_seqlens.numel() - 1
    if rewards is not None:
        rewards, cu_seqlens = _packed(rewards, cu_seqlens)
        mask = mask_column(mask, total, rewards.device)
    columns = [column(each, torch.float64, responses, each.device) for each in (scale, shift, outcomes)]
    out = torch.empty(total, dtype=torch.float32)
    fields = (_address(rewards), _address(mask), cu_seqlens.data_ptr(), responses, total)
    addresses = (each.data_ptr() for each in columns)
    return out, _run("rloo_returns", out.device, *fields, *addresses, *gammas, *coefs, out.data_ptr())


def centred_squares(values: Tensor, mean: float) -> float:
    """sum (value - mean)^2."""
    values = column(values, torch.float32, values.numel(), values.device)
    return _run("centred_squares", values.device, values.data_ptr(), values.numel(), mean)


def whiten(values: Tensor, mean: float, factor: float) -> Tensor:
    """(value - mean) * factor."""
    values = column(values, torch.float32, values.numel(), values.device)
    out = torch.empty_like(values)
    _run("whiten", values.device, values.data_ptr(), values.numel(), mean, factor, out.data_ptr())
    return out


def ppo_sums(columns: Sequence[Tensor | None], mask: Tensor | None, clip: tuple[float, float]) -> Tensor:
    """Sums [4] float64: of the weighted token losses, of clipped tokens, of log ratios, of tokens that count.

    ``columns``: logp, old_logp, advantages and weights or None, float32.
    """
    sums = torch.empty(4, dtype=torch.float64)
    fields, keep = _ppo_fields(columns, mask, clip)
    _run("ppo_loss", sums.device, *fields, sums.data_ptr())
    del keep
    return sums


def ppo_gradient(
    columns: Sequence[Tensor | None], mask: Tensor | None, clip: tuple[float, float], factor: float
) -> Tensor:
    """factor * d (sum of weighted token losses) / d logp, [T] float32."""
    out = torch.empty(columns[0].numel(), dtype=torch.float32)
    fields, keep = _ppo_fields(columns, mask, clip)
    _run("ppo_loss_backward", out.device, *fields, factor, out.data_ptr())
    del keep
    return out


def _ppo_fields(columns: Sequence[Tensor | None], mask: Tensor | None, clip: tuple[float, float]) -> tuple[Any, Any]:
    total, device = columns[0].numel(), columns[0].device
    logp, old_logp, advantages, weights = (column(each, torch.float32, total, device) for each in columns)
    mask = mask_column(mask, total, device)
    addresses = (_address(each) for each in (logp, old_logp, advantages, mask, weights))
    return (*addresses, total, *clip), (logp, old_logp, advantages, mask, weights)


def _packed(values: Tensor, cu_segments: Tensor) -> tuple[Tensor, Tensor]:
    values = column(values, torch.float32, values.numel(), values.device)
    return values, column(cu_segments, torch.int64, cu_segments.numel(), values.device)


def _segments(values: Tensor, cu_segments: Tensor) -> tuple[int, int, int, int]:
    return values.data_ptr(), cu_segments.data_ptr(), cu_segments.numel() - 1, values.numel()


def _run(name: str, device: torch.device, *fields: Any) -> Any:
    if device.type == "cpu":
        return getattr(_C, name)(*fields, torch.get_num_threads())
    # A launch goes to the current device, which need not be that of the tensors.
    with torch.cuda.device(device):
        return getattr(_C, f"cuda_{name}")(*fields, torch.cuda.current_stream(device).cuda_stream)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
