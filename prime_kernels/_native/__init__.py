"""The compiled extension: whether it is there, how it was built, and the call of one of its kernels.

rows.py, head.py, packed_cpu.py and packed_cuda.py turn tensors into addresses, sizes and strides; nothing else does.
"""

from typing import Any

import torch
from torch import Tensor

try:
    from prime_kernels import _C
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None
    _reason = f"the extension prime_kernels._C cannot be imported ({error}); build it with: pip install ."
else:
    _reason = None
    DTYPES = {torch.float32: _C.FLOAT32, torch.bfloat16: _C.BFLOAT16, torch.float16: _C.FLOAT16}


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
    without) and cpu (the instruction set of the CPU kernels: amx, avx512_bf16, avx512, avx2 or portable)."""
    return _C.build_info()


def constant(name: str) -> int:
    """A number that the extension was built with."""
    return getattr(_C, name)


def call(name: str, **fields: Any) -> Any:
    """A function of the extension that is no kernel."""
    return getattr(_C, name)(**fields)


def run(name: str, device: torch.device, *fields: Any) -> Any:
    """Calls the kernel of that name for the device."""
    if device.type == "cpu":
        return getattr(_C, name)(*fields, torch.get_num_threads())
    # A launch goes to the current device, which need not be that of the tensors.
    with torch.cuda.device(device):
        return getattr(_C, f"cuda_{name}")(*fields, torch.cuda.current_stream(device).cuda_stream)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
