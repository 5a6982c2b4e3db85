import pytest
import torch


def loop(values, cu_seqlens, gamma, reverse):
    out = torch.empty(len(values), dtype=torch.float64)
    for begin, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        y = 0.0
        for t in reversed(range(begin, end)) if reverse else range(begin, end):
            y = float(values[t]) + gamma * y
            out[t] = y
    return out


def cumulative(lengths):
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


CASES = {
    "one token each": [1] * 40,
    "empty segments": [0, 3, 0, 0, 5, 0],
    "one segment": [1000],
    "uneven": [1, 2000, 3, 700, 0, 257, 256, 255],
    "no tokens": [0, 0],
    "no segments": [],
}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.97, 1.0, -0.5])
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
def test_values(passes, lengths, gamma, reverse):
    cu_seqlens = cumulative(lengths)
    values = torch.randn(int(cu_seqlens[-1]))
    got = passes.scan_segments(values, cu_seqlens, gamma, reverse)
    assert got.dtype == torch.float32
    # One rounding of a double: nothing but the last bit may differ.
    torch.testing.assert_close(got.double(), loop(values, cu_seqlens, gamma, reverse), rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_thread_count_does_not_change_a_bit(passes, reverse):
    cu_seqlens = cumulative([*torch.randint(0, 900, (400,)).tolist(), 50000])
    values = torch.randn(int(cu_seqlens[-1]))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(passes.scan_segments(values, cu_seqlens, 0.99, reverse))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("cu_seqlens", [[1, 4], [0, 3], [0, 5, 4], [0, 9]], ids=str)
def test_boundaries_that_leave_the_tokens_are_rejected(passes, cu_seqlens):
    with pytest.raises(ValueError, match="rejected its arguments"):
        passes.scan_segments(torch.zeros(4), torch.tensor(cu_seqlens), 1.0, False)
