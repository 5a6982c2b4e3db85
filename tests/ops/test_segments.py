"""segment_scan, segment_sum and step_rewards against plain loops."""

import math

import pytest
import torch
from helpers.support import assert_close, gammas, lengths, offsets, scales, seeds, split, uniform
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


def loop_scan(values: list[float], sizes: list[int], gamma: float, reverse: bool) -> list[float]:
    result = []
    for part in split(values, sizes):
        running, scanned = 0.0, []
        for value in reversed(part) if reverse else part:
            running = value + gamma * running
            scanned.append(running)
        result += reversed(scanned) if reverse else scanned
    return result


@given(sizes=lengths, gamma=gammas, reverse=st.booleans(), scale=scales, seed=seeds)
def test_scan_matches_loop(backend, sizes, gamma, reverse, scale, seed):
    values = torch.tensor(uniform(sum(sizes), seed, -scale, scale)).requires_grad_()
    upstream = torch.tensor(uniform(sum(sizes), seed + 1, -1, 1))
    scanned = pk.segment_scan(values, offsets(sizes, torch.int32), gamma=gamma, reverse=reverse, backend=backend)
    assert scanned.dtype == torch.float32
    assert_close("sums", scanned / scale, [x / scale for x in loop_scan(values.tolist(), sizes, gamma, reverse)])
    scanned.backward(upstream)
    assert_close("sums", values.grad, loop_scan(upstream.tolist(), sizes, gamma, not reverse))


@pytest.mark.parametrize("gamma", [0.0, 1e-30, 0.3, 0.99, 1.0])
def test_scan_of_a_long_segment(backend, gamma):
    values = torch.rand(5000) - 0.2
    for reverse in (False, True):
        scanned = pk.segment_scan(values, offsets([1, 4998, 1]), gamma=gamma, reverse=reverse, backend=backend)
        assert_close("sums", scanned, loop_scan(values.tolist(), [1, 4998, 1], gamma, reverse))


def test_scan_keeps_bad_values_in_their_segment(backend):
    values = torch.tensor([1.0, math.nan, 2.0, math.inf, 3.0, 4.0])
    scanned = pk.segment_scan(values, offsets([1, 1, 2, 2]), gamma=0.5, backend=backend)
    assert scanned[[0, 2, 4, 5]].tolist() == [1.0, 2.0, 3.0, 5.5]
    assert math.isnan(scanned[1]) and math.isinf(scanned[3])


def test_scan_with_gamma_zero_returns_the_values(backend):
    values = torch.tensor([1.0, math.inf, -3.0])
    assert pk.segment_scan(values, offsets([3]), gamma=0.0, backend=backend).tolist() == values.tolist()


def test_scan_is_bitwise_repeatable(backend):
    values, cu = torch.randn(3000), offsets([1000, 0, 2000])
    first = pk.segment_scan(values, cu, gamma=0.97, backend=backend)
    assert all(torch.equal(first, pk.segment_scan(values, cu, gamma=0.97, backend=backend)) for _ in range(3))


def test_scan_takes_strided_and_half_values(backend):
    values = torch.randn(20).bfloat16()[::2]
    scanned = pk.segment_scan(values, offsets([4, 6]), backend=backend)
    assert_close("sums", scanned, loop_scan(values.tolist(), [4, 6], 1.0, False))


@given(sizes=lengths, scale=scales, seed=seeds)
def test_sum_matches_loop(sizes, scale, seed):
    values = torch.tensor(uniform(sum(sizes), seed, -scale, scale)).requires_grad_()
    upstream = torch.tensor(uniform(len(sizes), seed + 1, -1, 1))
    sums = pk.segment_sum(values, offsets(sizes))
    assert_close("sums", sums / scale, [sum(part) / scale for part in split(values.tolist(), sizes)])
    sums.backward(upstream)
    assert values.grad.tolist() == [upstream[i].item() for i, size in enumerate(sizes) for _ in range(size)]


def test_sum_of_many_terms_keeps_its_digits():
    values = torch.full((200_000,), 0.1)
    assert_close("sums", pk.segment_sum(values, offsets([200_000])), [200_000 * values[0].item()])


@given(
    steps=st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=5),
    mode=st.sampled_from(["single", "cumulative"]),
    seed=seeds,
)
def test_step_rewards_match_loop(steps, mode, seed):
    # An empty step at a boundary could belong to either side, so only inner ones are drawn here.
    steps = [[size for i, size in enumerate(row) if size or 0 < i < len(row) - 1] for row in steps]
    steps = [row if row and row[0] and row[-1] else [size for size in row if size] for row in steps]
    flat, sizes = [size for row in steps for size in row], [sum(row) for row in steps]
    rewards = torch.tensor(uniform(sum(sizes), seed, -1, 1)).requires_grad_()
    upstream = torch.tensor(uniform(len(flat), seed + 1, -1, 1))
    result = pk.step_rewards(rewards, offsets(flat), offsets(sizes), mode=mode)

    values, weights = rewards.tolist(), upstream.tolist()
    expected, gradient, token, step = [], [0.0] * len(values), 0, 0
    for row in steps:
        start = token
        for size in row:
            begin = start if mode == "cumulative" else token
            token += size
            expected.append(sum(values[begin:token]))
            for position in range(begin, token):
                gradient[position] += weights[step]
            step += 1
    assert_close("sums", result, expected)
    result.backward(upstream)
    assert_close("sums", rewards.grad, gradient)


def test_empty_steps_belong_to_the_response_at_their_offset():
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0])
    result = pk.step_rewards(rewards, offsets([0, 2, 0, 2, 0]), offsets([2, 2]), mode="cumulative")
    assert result.tolist() == [0.0, 3.0, 0.0, 12.0, 12.0]


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(reverse):
    values, cu = torch.randn(9, dtype=torch.float64, requires_grad=True), offsets([0, 4, 1, 4])
    check = torch.autograd.gradcheck
    assert check(lambda x: pk.segment_scan(x, cu, gamma=0.7, reverse=reverse), (values,))
    assert check(lambda x: pk.segment_sum(x, cu), (values,))
    assert check(lambda x: pk.step_rewards(x, offsets([2, 2, 1, 4]), cu, mode="cumulative"), (values,))


def test_float64_stays_float64():
    values = torch.randn(4, dtype=torch.float64)
    assert pk.segment_scan(values, offsets([4])).dtype == torch.float64
    assert pk.segment_sum(values, offsets([4])).dtype == torch.float64
    assert pk.step_rewards(values, offsets([4]), offsets([4])).dtype == torch.float64
