"""The functions that replace TRL's give what TRL's give, and its GRPO trainer trains the same with them."""

import importlib.util
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from helpers.support import code_blocks, run_page

from prime_kernels._bench import formulas
from prime_kernels.integrations import _patching
from prime_kernels.integrations import trl as ours

utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed: make test-integrations has it")


@pytest.fixture
def patched():
    ours.patch(replace_fused=True)
    yield utils
    ours.unpatch()


@pytest.fixture(scope="module")
def trl_steps():
    spec = importlib.util.spec_from_file_location("trl_steps", ROOT / "bench" / "trl_steps.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version(tested_version):
    assert version("trl") == tested_version("trl")


@pytest.mark.parametrize("kind", ["plain", "temperature", "row_mask", "several"])
def test_selective_log_softmax(rows, assert_same, kind):
    logits, index = rows
    arguments = {
        "plain": (index,),
        "temperature": (index, 0.6),
        "row_mask": (index, 1.3, (torch.rand(3, 5) < 0.6).long()),
        "several": (torch.randint(101, (3, 5, 4)), 0.6),
    }[kind]
    original = utils.selective_log_softmax
    assert original is not ours.selective_log_softmax
    assert_same(
        lambda z: ours.selective_log_softmax(z, *arguments),
        lambda z: original(z, *arguments),
        logits,
    )


def test_entropy(rows, assert_same):
    assert_same(ours.entropy_from_logits, utils.entropy_from_logits, rows[0])


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_both(rows, assert_same, requires_grad, masked):
    logits, index = rows
    mask = (torch.rand(3, 5) < 0.6).long() if masked else None
    original = utils.selective_log_softmax_and_entropy
    assert_same(
        lambda z: ours.selective_log_softmax_and_entropy(z, index, requires_grad, 0.7, mask),
        lambda z: original(z, index, requires_grad, 0.7, mask),
        logits,
    )


HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "no entropy": {"outputs": ("log_probs",)},
    "capped": {"final_logit_softcapping": 5.0},
    "every output": {"outputs": ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")},
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_fused_head(kind, bias):
    """The function under GRPO, RLOO, DPO and KTO; what ours does not have must be left to TRL's."""
    options = {"final_logit_softcapping": None, "logit_scale": 1.0, "outputs": ("log_probs", "entropy")} | HEADS[kind]
    original = utils._ChunkedLogProbFunction
    ours.patch(replace_fused=True)
    replacement = utils._ChunkedLogProbFunction
    ours.unpatch()
    assert utils._ChunkedLogProbFunction is original is not replacement
    targets = torch.randint(211, (17,))
    inputs = [torch.randn(17, 24), torch.randn(211, 24) * 0.5, *([torch.randn(211)] if bias else [])]
    results = []
    for function in (replacement, original):
        leaves = [each.clone().requires_grad_() for each in inputs]
        hidden, weight, *rest = leaves
        outputs = function.apply(hidden, weight, rest[0] if bias else None, targets, 0.9, 64, *options.values())
        torch.manual_seed(1)
        loss = sum((each * torch.randn(17)).sum() for each in outputs[:2] if each is not None)
        loss.backward()
        results.append(([*outputs], [leaf.grad for leaf in leaves]))
    (got, got_grads), (want, want_grads) = results
    assert [each is None for each in got] == [each is None for each in want]
    for one, other in zip(got + got_grads, want + want_grads, strict=True):
        torch.testing.assert_close(one, other, atol=3e-5, rtol=1e-4)


def test_fused_head_of_no_tokens(patched):
    """A batch with nothing to score must still reach the parameters, with a gradient of 0."""
    hidden, weight = torch.randn(0, 24).requires_grad_(), torch.randn(50, 24).requires_grad_()
    function, none = patched._ChunkedLogProbFunction, torch.zeros(0, dtype=torch.long)
    logp, entropy, *_ = function.apply(hidden, weight, None, none, 1.0, 64, None, 1.0, ("log_probs", "entropy"))
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros(50, 24))


def test_fused_head_under_autocast(patched):
    """The head in float32 and autocast to bfloat16: logits of bfloat16, results and gradients of float32."""
    hidden, weight = torch.randn(9, 24).requires_grad_(), torch.randn(50, 24).requires_grad_()
    targets = torch.randint(50, (9,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = patched._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("log_probs",))[
            0
        ]
    logp.sum().backward()
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    assert logp.dtype == hidden.grad.dtype == weight.grad.dtype == torch.float32
    assert 0 < (logp - exact).abs().max() < 0.2


def test_modules_get_them_and_lose_them():
    from trl.kernels import chunked_logprob
    from trl.trainer import grpo_trainer, rloo_trainer

    assert grpo_trainer.add_fused_lm_head.__globals__ is rloo_trainer.add_fused_lm_head.__globals__ is vars(utils)
    before = (utils.selective_log_softmax, utils.entropy_from_logits, utils._ChunkedLogProbFunction)
    ours.patch(replace_fused=True)
    ours.patch(replace_fused=True)
    assert utils.selective_log_softmax is ours.selective_log_softmax
    assert utils.entropy_from_logits is ours.entropy_from_logits
    assert utils.selective_log_softmax_and_entropy is ours.selective_log_softmax_and_entropy
    assert utils._ChunkedLogProbFunction is chunked_logprob.ChunkedLogProbFunction is not before[2]
    ours.unpatch()
    assert (utils.selective_log_softmax, utils.entropy_from_logits, utils._ChunkedLogProbFunction) == before


def test_what_a_gpu_leaves_in_place(monkeypatch):
    """TRL's Triton kernels: the head and the joint function stay, with what TRL imports of its own."""
    from trl.kernels import chunked_logprob

    monkeypatch.setattr(_patching, "on_cuda", lambda: True)
    before = utils._ChunkedLogProbFunction, utils.selective_log_softmax_and_entropy
    done = ours.patch()
    assert set(done.left) == {
        "trl.trainer.utils.selective_log_softmax_and_entropy",
        "trl.kernels.chunked_logprob.ChunkedLogProbFunction",
    }
    assert (utils._ChunkedLogProbFunction, utils.selective_log_softmax_and_entropy) == before
    assert chunked_logprob.ChunkedLogProbFunction is before[0]
    assert utils.selective_log_softmax is ours.selective_log_softmax
    assert ours.patch(replace_fused=True).left == {}
    assert utils._ChunkedLogProbFunction is not before[0]
    ours.unpatch()


def test_grpo_trains_the_same(tmp_path, trl_steps):
    """Five real steps on a tiny model: losses, gradient norms and entropies agree, and ours was what ran."""
    from helpers.tiny import write_model

    model = write_model(tmp_path)
    options = SimpleNamespace(steps=5, tokens=12, dtype="float32")
    theirs, mine = (trl_steps.run(model, patch=patch, **vars(options)) for patch in (False, True))
    assert len(theirs["logs"]) == len(mine["logs"]) == 5
    for one, other in zip(mine["logs"], theirs["logs"], strict=True):
        assert other["grad_norm"] > 0
        for key in trl_steps.KEYS:
            assert one[key] == pytest.approx(other[key], abs=1e-4), key
    assert max(abs(entry["loss"]) for entry in mine["logs"]) > 1e-3
    assert mine["tokens"] == theirs["tokens"] and len(mine["backward_seconds"]) == 5


@pytest.mark.parametrize("op", ["log_probs", "linear_log_probs"])
def test_what_benchmarks_compare_with(op):
    """TRL's own functions as `python -m prime_kernels bench` calls them."""
    ids, inputs = torch.randint(211, (17,)), [torch.randn(17, 211)]
    if op == "linear_log_probs":
        inputs = [torch.randn(17, 24), torch.randn(211, 24) * 0.5]
    theirs = formulas.peers(op, "cpu")["trl"](*inputs, ids)
    torch.testing.assert_close(theirs, getattr(formulas, op)(*inputs, ids), atol=2e-5, rtol=1e-5)


def test_page(tmp_path):
    from helpers.tiny import write_model

    run_page(ROOT / "docs" / "trl.md", MODEL=write_model(tmp_path))


def test_readme():
    original = utils.selective_log_softmax
    _, block = code_blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    patch, unpatch = block.split("# ... make and run the trainer as usual ...")
    names = {}
    exec(patch, names)
    assert utils.selective_log_softmax is ours.selective_log_softmax is not original
    exec(unpatch, names)
    assert utils.selective_log_softmax is original
