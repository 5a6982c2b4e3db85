"""Logits whose float32 sums are never rounded, for every dtype, shape and backend that runs here."""

import pytest
import torch

import prime_kernels as pk
from prime_kernels.integrations import head_logits

BACKENDS = [name for name in ("eager", "cpu") if pk.available_backends()[name] is None]
SUMS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", SUMS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_values(backend, dtype, bias):
    """Tokens around the lanes of every instruction set, vocabularies and widths that fill no vector."""
    if dtype == torch.float64 and backend != "eager":
        pytest.skip("float64 is for eager alone")
    for shape, width, vocabulary in [
        ((1,), 7, 3),
        ((9,), 24, 50),
        ((3, 7), 40, 613),
        ((33,), 65, 49),
        ((2, 40), 16, 1),
    ]:
        hidden, weight = torch.randn(*shape, width).to(dtype), (torch.randn(vocabulary, width) / 4).to(dtype)
        added = torch.randn(vocabulary).to(dtype) if bias else None
        exact = hidden.double() @ weight.double().T + (0 if added is None else added.double())
        found = head_logits(hidden.requires_grad_(), weight, added, backend=backend)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert found.shape == exact.shape and found.is_contiguous() and not found.requires_grad
        assert (found - exact).abs().max() < SUMS[dtype]
    assert head_logits(torch.empty(0, 4, dtype=dtype), torch.ones(5, 4, dtype=dtype), backend=backend).shape == (0, 5)


def test_a_part_of_a_larger_matrix():
    hidden, weight = torch.randn(5, 40).bfloat16()[:, ::2], torch.randn(40, 30).bfloat16()[:20].T
    exact = hidden.double() @ weight.double().T
    assert (head_logits(hidden, weight) - exact).abs().max() < 1e-5


def test_the_log_probs_of_the_linear_operations_come_from_these():
    hidden, weight, ids = torch.randn(20, 64).bfloat16(), torch.randn(97, 64).bfloat16(), torch.randint(97, (20,))
    from_logits = pk.log_probs(head_logits(hidden, weight), ids)
    torch.testing.assert_close(from_logits, pk.linear_log_probs(hidden, weight, ids), atol=4e-6, rtol=2e-6)


def test_what_it_refuses():
    hidden, weight = torch.ones(3, 4), torch.ones(5, 4)
    with pytest.raises(ValueError, match=r"weight: expected shape .* got \[5, 6\]"):
        head_logits(hidden, torch.ones(5, 6))
    with pytest.raises(TypeError, match="weight: expected dtype float32, got bfloat16"):
        head_logits(hidden, weight.bfloat16())
    with pytest.raises(ValueError, match=r"bias: expected shape .* got \[4\]"):
        head_logits(hidden, weight, torch.ones(4))
