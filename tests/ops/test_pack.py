"""pack and unpack against slices of each row."""

import math

import pytest
import torch
from helpers.support import lengths, offsets, seeds, split
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int8, torch.bool]


def slices(tokens, sizes, length, padding, fill):
    """Row by row; tokens [T, ...]."""
    rows = []
    for part in split(list(tokens), sizes):
        blank = [torch.full_like(tokens[0], fill)] * (length - len(part))
        rows.append(torch.stack(part + blank if padding == "right" else blank + part))
    return torch.stack(rows)


def some(shape, dtype):
    return torch.randint(-3, 4, shape).to(dtype)


@given(sizes=lengths, extra=st.integers(0, 3), padding=st.sampled_from(["right", "left"]), seed=seeds)
def test_rows_match_slices(backend, sizes, extra, padding, seed):
    torch.manual_seed(seed)
    length = max([*sizes, 0]) + extra
    tokens = some([sum(sizes)], torch.float32)
    padded = pk.unpack(tokens, offsets(sizes, torch.int32), length=length, padding=padding, fill=7, backend=backend)
    assert padded.shape == (len(sizes), length)
    if tokens.numel():
        assert torch.equal(padded, slices(tokens, sizes, length, padding, 7.0))
    assert torch.equal(pk.pack(padded, offsets(sizes), padding=padding, backend=backend), tokens)


@pytest.mark.parametrize("trailing", [[], [3], [2, 5], [0]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_dtype_and_trailing_shape(backend, dtype, trailing):
    sizes, fill = [2, 0, 3, 1], 1
    tokens = some([6, *trailing], dtype)
    padded = pk.unpack(tokens, offsets(sizes), length=4, padding="left", fill=fill, backend=backend)
    assert padded.dtype == dtype and torch.equal(padded, slices(tokens, sizes, 4, "left", fill))
    assert torch.equal(pk.pack(padded, offsets(sizes), total=6, padding="left", backend=backend), tokens)


@pytest.mark.parametrize("fill", [-math.inf, 1e300, 0.1])
def test_fills_of_the_dtype(backend, fill):
    padded = pk.unpack(torch.ones(1), offsets([1]), length=2, fill=fill, backend=backend)
    assert padded.tolist() == [[1.0, torch.tensor(fill).item()]]


def test_strided_rows(backend):
    padded = torch.arange(24.0).view(4, 6).T[::2]
    expected = torch.cat((padded[0, :2], padded[1, :0], padded[2, :4]))
    assert torch.equal(pk.pack(padded, offsets([2, 0, 4]), backend=backend), expected)
    tokens = torch.arange(12.0)[::2]
    assert pk.unpack(tokens, offsets([2, 4]), backend=backend).tolist() == [[0, 2, 0, 0], [4, 6, 8, 10]]


@pytest.mark.parametrize("padding", ["right", "left"])
def test_gradients_of_each_other(backend, padding):
    sizes, cu = [2, 0, 3], offsets([2, 0, 3])
    padded = torch.randn(3, 4, 2, requires_grad=True)
    upstream = torch.randn(5, 2)
    pk.pack(padded, cu, padding=padding, backend=backend).backward(upstream)
    assert torch.equal(padded.grad, slices(upstream, sizes, 4, padding, 0.0))

    tokens = torch.randn(5, 2, requires_grad=True)
    grad = torch.randn(3, 4, 2)
    pk.unpack(tokens, cu, length=4, padding=padding, fill=3.0, backend=backend).backward(grad)
    kept = [row[:n] if padding == "right" else row[4 - n :] for row, n in zip(grad, sizes, strict=True)]
    assert torch.equal(tokens.grad, torch.cat(kept))


def test_offsets_of_a_mask(backend):
    """As the documentation says."""
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    cu = torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
    padded = torch.randn(3, 3)
    assert torch.equal(pk.pack(padded, cu, backend=backend), padded[mask])


def test_in_one_graph(backend):
    cu = offsets([2, 0, 3])

    def call(tokens):
        padded = pk.unpack(tokens, cu, length=4, fill=1.0, backend=backend)
        return pk.pack(2.0 * padded, cu, total=5, backend=backend)

    tokens = torch.randn(5)
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(tokens), 2.0 * tokens)
