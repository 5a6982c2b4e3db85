"""What the machine can do in this run: the rates that the table's fractions are of."""

import pytest
import torch
from measure import DEVICE, SMALL, timed, without_gradients

# 256 MB, beyond every cache; on a GPU 2 GB.
ELEMENTS = 1 << 10 if SMALL else 1 << (30 if DEVICE == "cuda" else 27)
SIDE = 64 if SMALL else 8192 if DEVICE == "cuda" else 2048


@pytest.mark.benchmark(group="ceiling: copy")
def test_copy(benchmark):
    source = torch.zeros(ELEMENTS, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    timed(benchmark, without_gradients(lambda: target.copy_(source)), 2 * source.nbytes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.benchmark(group="ceiling: matrix product")
def test_product(benchmark, dtype):
    left, right = (torch.randn(SIDE, SIDE, device=DEVICE).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    timed(benchmark, without_gradients(lambda: torch.mm(left, right, out=out)), flops=2 * SIDE**3)
