"""The functions that replace SkyRL's give what SkyRL's give, and its modules get them."""

import importlib
import importlib.util
import sys
from importlib.metadata import version
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from helpers.support import run_page

from prime_kernels.integrations import _patching
from prime_kernels.integrations import skyrl as ours

NAMES = ("logprobs_from_logits", "logprobs_from_logits_v2", "chunked_entropy_from_logits")


@pytest.fixture(scope="module")
def utils(stand_in):
    if importlib.util.find_spec("skyrl") is None:
        pytest.skip("SkyRL is not installed: make test-integrations has it")
    stand_in("jaxtyping", "ray", "loguru", "cloudpathlib", "s3fs", "gcsfs")
    # The package imports its server's models, which pydantic refuses on Python 3.11.
    backends = ModuleType("skyrl.backends")
    backends.__path__ = [f"{importlib.import_module('skyrl').__path__[0]}/backends"]
    sys.modules.setdefault(backends.__name__, backends)
    return importlib.import_module("skyrl.backends.skyrl_train.utils.torch_utils")


def test_version(utils, tested_version):
    assert version("skyrl") == tested_version("skyrl")


@pytest.mark.parametrize("name", NAMES[:2])
def test_log_probs(utils, rows, assert_same, name):
    logits, labels = rows
    original, replacement = getattr(utils, name), getattr(ours, name)
    assert original is not replacement
    assert_same(lambda z: replacement(z, labels), lambda z: original(z, labels), logits)


@pytest.mark.parametrize("masked", [False, True])
def test_entropy(utils, rows, assert_same, masked):
    mask = (torch.rand(3, 5) < 0.6).float() if masked else None
    options = {"requires_grad": True, "attention_mask": mask, "chunk_size": 2}
    assert_same(
        lambda z: ours.chunked_entropy_from_logits(z, **options),
        lambda z: utils.chunked_entropy_from_logits(z, **options),
        rows[0],
    )
    assert not ours.chunked_entropy_from_logits(rows[0]).requires_grad
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[3, 5\], got \[5, 3\]"):
        ours.chunked_entropy_from_logits(rows[0], attention_mask=torch.ones(5, 3))


def test_both_with_gradients_as_the_wrapper_calls_them(utils, rows):
    """It asks for backward in place and then takes the entropy of the same logits."""
    logits, labels = rows
    grads = []
    for module in (ours, utils):
        leaf = logits.detach().clone().requires_grad_()
        inner = leaf * 1.0
        logp = module.logprobs_from_logits(inner, labels, inplace_backward=True)
        entropy = module.chunked_entropy_from_logits(inner, requires_grad=True)
        (logp.sum() + 0.3 * entropy.sum()).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, atol=2e-5, rtol=1e-4)


def test_modules_get_them_and_lose_them(utils, monkeypatch):
    before = [getattr(utils, name) for name in NAMES]
    assert ours.patch(replace_fused=True).left == {}
    assert [getattr(utils, name) for name in NAMES] == [getattr(ours, name) for name in NAMES]
    monkeypatch.setattr(_patching, "on_cuda", lambda: True)
    monkeypatch.setattr(_patching, "exists", lambda module: True)
    assert [*ours.patch().left] == [f"{utils.__name__}.logprobs_from_logits"]
    assert utils.logprobs_from_logits is before[0]
    ours.unpatch()
    assert [getattr(utils, name) for name in NAMES] == before


def test_page(utils):
    run_page(ROOT / "docs" / "skyrl.md")
