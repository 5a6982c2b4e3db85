"""Tests of large memory that is reused from call to call."""

import sys
import threading

import pytest
import torch

import prime_kernels as pk

if pk.available_backends()["cpu"] is not None:
    pytest.skip("the C++ kernels are not built", allow_module_level=True)

from prime_kernels import _native

MIB = 2**20
REUSED = pytest.mark.skipif(sys.platform != "linux", reason="memory is reused on Linux alone")


def memory(mebibytes):
    return _native.empty(torch.float32, mebibytes, MIB // 4)


@pytest.fixture(autouse=True)
def nothing_spare():
    _native.release_spare_memory()
    yield
    _native.release_spare_memory()


def test_two_at_once_are_apart():
    one, other = memory(3), memory(3)
    assert one.shape == (3, MIB // 4) and one.dtype == torch.float32
    one.fill_(1.0)
    other.fill_(2.0)
    assert (one == 1.0).all() and (other == 2.0).all()


@REUSED
def test_what_is_freed_is_taken_again():
    one = memory(5)
    place = one.data_ptr()
    view = one[1:].fill_(3.0)
    del one
    assert memory(5).data_ptr() != place  # a view still needs it
    assert (view == 3.0).all()
    del view
    assert memory(5).data_ptr() == place  # by 2 MiB pages: 6
    assert memory(4).data_ptr() == place
    assert memory(2).data_ptr() == place
    _native.release_spare_memory()
    one = memory(12)
    place = one.data_ptr()
    del one
    assert memory(2).data_ptr() != place  # less than a quarter
    assert memory(3).data_ptr() == place


@REUSED
def test_the_smallest_that_fits_is_taken():
    large, small = memory(8), memory(4)
    place = small.data_ptr()
    del large, small
    assert memory(3).data_ptr() == place


@REUSED
def test_what_is_spare_is_bounded():
    blocks = [memory(mebibytes) for mebibytes in (100, 200, 300)]  # never touched: they are no memory yet
    last = blocks[-1].data_ptr()
    while blocks:
        blocks.pop(0)
    # 600 MiB: the one that was given back first goes.
    assert memory(300).data_ptr() == last
    assert _native.release_spare_memory() == 500 * MIB
    assert _native.release_spare_memory() == 0
    block = memory(600)
    del block
    assert _native.release_spare_memory() == 0


def test_small_memory_is_torchs():
    assert _native.empty(torch.bfloat16, MIB - 1).untyped_storage().resizable()
    assert _native.empty(torch.bfloat16, 0, 4).shape == (0, 4)


def test_many_threads():
    wrong = []

    def work(number):
        for size in range(40):
            mine = memory(2 + size % 3)
            mine[:, :3] = number
            if not (mine[:, :3] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_gradients_of_two_calls_are_apart():
    logits = torch.randn(64, 20000, requires_grad=True)
    ids = torch.zeros(64, dtype=torch.long)
    once, twice = (torch.autograd.grad(pk.log_probs(logits, ids, backend="cpu").sum(), logits)[0] for _ in range(2))
    assert once.nbytes > 2 * MIB and once.data_ptr() != twice.data_ptr() and torch.equal(once, twice)
    want = once.clone()
    assert not once._is_view()
    once.mul_(2.0)  # by the caller
    assert torch.equal(twice, want) and torch.equal(once, 2.0 * want)
