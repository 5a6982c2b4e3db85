"""Assertions about a batch's values, and its copies in the types of the other kernels, in one launch."""

import dataclasses
import math

import pytest
import torch
from helpers.rloo_batches import WRONG, batch, changed
from triton.runtime import interpreter

from prime_kernels._triton import rloo as kernels


@pytest.fixture(autouse=True)
def assertions(monkeypatch):
    """The interpreter drops the assertions also of kernels with debug=True (Triton 3.6)."""
    assert kernels.check_rloo_kernel.kwargs["debug"] is True
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=True))


@pytest.mark.parametrize("process", [True, False])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types(dtype, integers, process):
    given = batch(dtype, dtype, integers, process=process)
    got = kernels.checked_batch(given)
    want = (torch.float32, torch.float64, torch.int64, torch.int64)
    values = (got.process_rewards, got.outcomes, got.cu_seqlens, got.cu_groups)
    sources = (given.process_rewards, given.outcomes, given.cu_seqlens, given.cu_groups)
    for value, source, kind in zip(values, sources, want, strict=True):
        if source is None:
            assert value is None
        else:
            assert value.dtype == kind and torch.equal(value, source.to(kind))


def test_nothing_is_copied_without_need():
    given = batch()
    got = kernels.checked_batch(given)
    assert all(one is other for one, other in zip(got, given, strict=True))


def test_masked_rewards_are_not_read():
    given = batch(torch.bfloat16, masked=True)
    given.process_rewards[~given.reward_mask] = math.nan
    got = kernels.checked_batch(given).process_rewards
    assert torch.equal(got, given.process_rewards.float().where(given.reward_mask, 0.0))
    given.process_rewards[3] = math.inf
    with pytest.raises(Exception, match="process_rewards: expected finite values"):
        kernels.checked_batch(given)


@pytest.mark.parametrize("name, at, value, message", WRONG, ids=[f"{name} {at}" for name, at, *_ in WRONG])
def test_assertions(name, at, value, message):
    with pytest.raises(Exception, match=message):
        kernels.checked_batch(changed(name, at, value))


def test_tokens_are_not_known_without_process_rewards():
    kernels.checked_batch(batch(process=False))
