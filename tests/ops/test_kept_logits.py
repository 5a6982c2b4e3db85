"""Logits kept from forward to backward: the bits of those that are computed again, in three products for four."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from helpers.support import IdleRows
from ops.test_linear_log_probs import set_tiles
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import prime_kernels as pk
from prime_kernels import _backends, _tuning
from prime_kernels._backends import LinearHead
from prime_kernels.integrations import tile_sizes
from prime_kernels.ops import _fused_tiles, _tiled_head
from prime_kernels.ops.linear_log_probs import Settings, TiledLogProbs

GIB = 2**30
EVERYTHING = 2**40


def tiles_of_both_ways(monkeypatch, kept):
    """Forward by 16 tokens x 24 columns, backward by twice the columns: no size divides 20 tokens or 61 columns."""
    set_tiles(monkeypatch, 16, 24, kept)
    monkeypatch.setattr(_tiled_head, "BACKWARD_ELEMENTS", {"cpu": 16 * 60, "cuda": 16 * 60})


def leaves(dtype, bias=True, n=20, d=12, v=61):
    made = [torch.randn(n, d), torch.randn(v, d), torch.randn(v)]
    return [each.to(dtype).requires_grad_() for each in made[: 2 + bias]]


KINDS = {
    "float32": (torch.float32, False, "float32", {}),
    "bfloat16": (torch.bfloat16, False, "float32", {}),
    "bfloat16, bias": (torch.bfloat16, True, "float32", {}),
    "float16, entropy, cap": (torch.float16, False, "float32", {"softcap": 5.0, "with_entropy": True}),
    "rounded, bias": (torch.bfloat16, True, "input", {"temperature": 0.7}),
}


@pytest.mark.parametrize("ids_a_token", [None, 3], ids=["one id", "three ids"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(backend, monkeypatch, kind, ids_a_token):
    """Of results and gradients; in a second backward pass, too, and near those in float64."""
    dtype, bias, logits_dtype, options = KINDS[kind]
    of, ids = leaves(dtype, bias), torch.randint(61, (20,) if ids_a_token is None else (20, ids_a_token))
    found = []
    for kept in (EVERYTHING, 0):
        tiles_of_both_ways(monkeypatch, kept)
        results = pk.linear_log_probs(
            *of[:2], ids, bias=of[2] if bias else None, logits_dtype=logits_dtype, backend=backend, **options
        )
        results = results if isinstance(results, tuple) else (results,)
        torch.manual_seed(3)
        upstream = [torch.randn_like(each) for each in results]
        for last in (False, True):
            grads = torch.autograd.grad(results, of, upstream, retain_graph=not last)
            found.append([each.detach() for each in (*results, *grads)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    exact = [each.detach().double().requires_grad_() for each in of]
    want = pk.linear_log_probs(*exact[:2], ids, bias=exact[2] if bias else None, backend="eager", **options)
    want = want if isinstance(want, tuple) else (want,)
    grads = torch.autograd.grad(want, exact, [each.double() for each in upstream])
    allowed = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for mine, other in zip(found[0][len(want) :], grads, strict=True):
        assert (mine.double() - other).abs().max() <= allowed * other.abs().max()


@pytest.fixture
def tiled(backend):
    if backend == "eager":
        pytest.skip("its logits come in chunks of their own")
    return backend


@pytest.mark.parametrize("ids_a_token", [None, 3], ids=["one id", "three ids"])
def test_they_are_gone_after_the_backward_pass(tiled, monkeypatch, ids_a_token):
    tiles_of_both_ways(monkeypatch, EVERYTHING)
    made, plain = [], _tiled_head.empty_logits
    monkeypatch.setattr(_tiled_head, "empty_logits", lambda *args: _seen(plain(*args), made))
    of, ids = leaves(torch.bfloat16), torch.randint(61, (20,) if ids_a_token is None else (20, ids_a_token))
    logp = pk.linear_log_probs(*of[:2], ids, bias=of[2], backend=tiled)
    assert len(made) == 1 and made[0]() is not None
    logp.sum().backward()
    gc.collect()  # of Triton's interpreter
    assert logp is not None and made[0]() is None
    with torch.no_grad():
        pk.linear_log_probs(*of[:2], ids, bias=of[2], backend=tiled)
    pk.linear_log_probs(*[each.detach() for each in of[:2]], ids, backend=tiled)
    assert len(made) == 1


def _seen(logits, made):
    made.append(weakref.ref(logits.untyped_storage()))
    return logits


def test_memory_in_pieces(tiled, monkeypatch):
    """Free memory would do, yet no piece is large enough: the logits are computed again."""
    of, ids = leaves(torch.bfloat16), torch.randint(61, (20,))
    tiles_of_both_ways(monkeypatch, EVERYTHING)

    def run():
        return torch.autograd.grad(pk.linear_log_probs(*of[:2], ids, backend=tiled).sum(), of[:2])

    want, tried = run(), []
    plain = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        if shape == (20, 64) and self.dtype == torch.bfloat16 and options:
            tried.append(shape)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, *shape, **options)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    assert all(map(torch.equal, want, run())) and tried == [(20, 64)]


class Products(TorchDispatchMode):
    """Operations of all products."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.mm.", "aten.addmm.")):
            a, b = [each for each in args if isinstance(each, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.mark.parametrize(
    "tokens, size, products",
    [(8192, None, 3), (16384, None, 4), (16384, 9 * GIB, 3), (8192, 1, 4), (512, None, 3)],
    ids=["by default", "too many", "more of them", "none", "few"],
)
def test_products_on_a_gpu_of_80_gb(monkeypatch, tokens, size, products):
    """4 GiB of float32 logits are kept by default, 8 GiB where a tuning says so."""
    monkeypatch.setattr(_backends, "rows", lambda backend: IdleRows())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    d, v = 64, 131072
    of = [torch.empty(n, d, device="meta", dtype=torch.bfloat16, requires_grad=True) for n in (tokens, v)]
    ids, settings = torch.empty(tokens, dtype=torch.int64, device="meta"), Settings(1.0, None, False, False, "cuda")
    tuning = nullcontext() if size is None else _tuning.trial(_tuning.none("cuda")._replace(tiles={"kept_bytes": size}))
    with tuning, Products() as counted:
        logp, _ = TiledLogProbs.apply(*of, None, ids, settings, None, True)
        grads = torch.autograd.grad(logp.sum(), of)
    assert counted.flops == products * 2 * tokens * d * v
    assert [each.shape for each in grads] == [each.shape for each in of]


@pytest.mark.parametrize("free, held, kept", [(13, 0, True), (11.9, 0, False), (6, 6.1, True), (0, 0, False)])
def test_a_third_of_the_free_memory_at_most(monkeypatch, free, held, kept):
    """4 GiB: what torch's allocator holds and does not use is free. Small ones are kept unasked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * GIB), 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int((held + 1) * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    with FakeTensorMode():
        for tokens, wanted in ((8192, kept), (1024, True)):
            hidden, weight = (torch.empty(n, 8, device="cuda", dtype=torch.bfloat16) for n in (tokens, 131072))
            head = LinearHead(hidden, weight, None, torch.empty(tokens), 1.0, False)
            assert _tiled_head.can_keep(head, "triton") == wanted


def test_sizes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tile_sizes("cuda").kept_bytes == 4864 * 2**20 and tile_sizes("cpu").kept_bytes == 2**28
    monkeypatch.setattr(_fused_tiles, "ASSUMED_MEMORY", GIB)
    assert tile_sizes("cuda").kept_bytes == 2**29
    with _tuning.trial(_tuning.none("cuda")._replace(tiles={"kept_bytes": 77})):
        assert tile_sizes("cuda").kept_bytes == 77 and tile_sizes("cpu").kept_bytes == 2**28


@pytest.mark.parametrize(
    "parts, sizes, total, want",
    [
        ((16, 24), (16, 60), (20, 101), (16, 48)),
        ((16, 24), (16, 200), (20, 200), (16, 200)),
        ((41, 100), (170, 100), (1000, 100), (164, 100)),
        ((16, 24), (16, 24), (20, 101), (16, 24)),
        ((4, 10), (4, 10), (4, 10), (4, 10)),
    ],
)
def test_tiles_of_gradients_are_whole_tiles(parts, sizes, total, want):
    assert _tiled_head.whole_tiles(parts, sizes, *total) == want
