"""The compiled extension: whether it is available and how it was built.

rows.py, head.py and packed.py turn tensors into addresses, sizes and strides and call its kernels; nothing else does.
"""

import math

import torch
from torch import Tensor

from prime_kernels._distribution import conflict, how_to_build, install_command

try:
    from prime_kernels import _C  # type: ignore[attr-defined]  # compiled, has no stubs
except ImportError as error:  # a source tree that was never built, or a build for another Python
    _C = None
    _reason: str | None = f"the extension prime_kernels._C cannot be imported ({error}); {conflict() or how_to_build()}"
else:
    _reason = None
    DTYPES: dict[torch.dtype, int] = {
        torch.float32: _C.FLOAT32,
        torch.bfloat16: _C.BFLOAT16,
        torch.float16: _C.FLOAT16,
        torch.float64: _C.FLOAT64,
    }


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
            f"with: PRIME_KERNELS_CUDA=ON {install_command()}"
        )
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def build_info() -> dict[str, str | bool]:
    """The build and what runs.

    Keys: compiler, flags, openmp, cuda, cuda_detail (the architectures, or why there are none) and cpu (the instruction
    set of the CPU kernels in use: amx, avx512_bf16, avx512, avx2 or portable).
    """
    info: dict[str, str | bool] = _C.build_info()
    return info


def address(tensor: Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def empty(dtype: torch.dtype, *shape: int) -> Tensor:
    """Uninitialised, on CPUs. Large memory is reused from call to call: the system zeroes new pages at first touch.

    The storage of a large one cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _C.LEAST_MEMORY:
        return torch.empty(shape, dtype=dtype, device="cpu")
    # No view: those that are made without a graph cannot be changed in place by the caller.
    return torch.frombuffer(_C.Memory(size), dtype=dtype).resize_(shape)


def release_spare_memory() -> int:
    """Give memory that waits to be reused back to the system; its bytes."""
    return 0 if _C is None else int(_C.release_spare_memory())
