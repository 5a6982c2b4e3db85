"""Sizes of tiles over the whole vocabulary, and the products and sums of a loss, counted on tensors without data."""

import pytest
import torch
from helpers.support import IdleRows
from torch.utils._python_dispatch import TorchDispatchMode

from prime_kernels import _backends
from prime_kernels._backends import LinearHead
from prime_kernels.integrations import tile_sizes
from prime_kernels.ops import _fused_tiles, _tiled_head

MIB = 2**20


@pytest.mark.parametrize(
    "gib, mib", [(79.1, 4864), (79.6, 4864), (80, 5120), (139.8, 8704), (39.4, 2432), (24, 1536), (3, 192), (1, 128)]
)
def test_sizes(gib, mib):
    assert _fused_tiles.of_memory(int(gib * 2**30), 128 * MIB) == mib * MIB


@pytest.mark.parametrize(
    "needed, free, want",
    [(4096, 9000, 2048), (4096, 6144, 2048), (4096, 6143, 1024), (300, 900, 2048), (300, 899, 256), (4096, 0, 128)],
)
def test_little_memory(needed, free, want):
    """A third of what is free at most, and never less than the least."""
    assert _fused_tiles.halved(2048 * MIB, needed * MIB, free * MIB, 128 * MIB) == want * MIB


class Products(TorchDispatchMode):
    """(name, elements of the result) of products and of sums of large tensors."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if name.split(".")[0] in ("mm", "addmm", "add_", "add"):
            self.seen.append((name, result.numel()))
        return result


def products(monkeypatch, tokens, width, vocabulary, dtype=torch.bfloat16):
    monkeypatch.setattr(_backends, "rows", lambda backend: IdleRows())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hidden, weight = (torch.empty(n, width, device="meta", dtype=dtype) for n in (tokens, vocabulary))
    ids = torch.empty(tokens, dtype=torch.int64, device="meta")
    head = LinearHead(hidden, weight, None, ids, 1.0, rounded=True)
    with Products() as counted:
        _, gradients = _tiled_head.loss_gradients(head, lambda logp, tokens: logp, [True, True, False], "cuda")
    assert gradients.hidden.dtype == gradients.weight.dtype == dtype
    assert gradients.weight.shape == (vocabulary, width)
    return counted.seen


def test_three_products_where_one_tile_holds_all_logits(monkeypatch):
    """8,192 x 131,072 logits of bfloat16 are 2 GiB: nothing is added."""
    n, d, v = 8192, 4096, 131072
    assert products(monkeypatch, n, d, v) == [("mm.out", n * v), ("mm.out", n * d), ("mm.out", v * d)]


def test_tiles_are_added_by_their_product(monkeypatch):
    """Two tiles of a size: the gradient of the head never takes a pass of its own."""
    n, d, v = 3 * 8192, 64, 131072
    seen = products(monkeypatch, n, d, v)
    assert seen == [("mm.out", n // 2 * v), ("mm.out", n // 2 * d), ("addmm.dtype_out", v * d)] * 2


def test_without_such_a_product_blocks_are_added(monkeypatch):
    """As before torch had it, and on CPUs."""
    monkeypatch.setattr(_fused_tiles, "sums_in_product", lambda device_type: False)
    names = [name for name, _ in products(monkeypatch, 3 * 8192, 64, 131072)]
    assert (
        names.count("add_.Tensor") == 2 * 131072 // _fused_tiles.ADDED_ROWS["cuda"] and "addmm.dtype_out" not in names
    )


def test_cpus_sum_as_before():
    assert not _fused_tiles.sums_in_product("cpu")
    assert tile_sizes("cpu").fused_bytes == _tiled_head.FUSED_BYTES
    assert tile_sizes("cpu").added_rows == _fused_tiles.ADDED_ROWS["cpu"]
    assert _fused_tiles.fitting(2**40, 2**40, torch.device("cpu"), 1) == 2**40


def test_plans_use_the_same_sizes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sizes = tile_sizes("cuda")
    assert sizes.fused_bytes == 4864 * MIB == _tiled_head.fused_bytes("cuda")
    assert sizes.added_rows == (0 if _fused_tiles.sums_in_product("cuda") else _fused_tiles.ADDED_ROWS["cuda"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_product_adds_itself_on_a_gpu():
    total, a, b = torch.randn(64, 32, device="cuda"), *torch.randn(2, 64, 64, device="cuda").bfloat16()
    want = total.double() + a.double() @ b[:, :32].double()
    _fused_tiles.add_product(total, a, b[:, :32])
    torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-4)
