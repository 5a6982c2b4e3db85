"""Second derivatives: right for linear operations, a clear error through other kernels, never silently 0."""

import pytest
import torch

import prime_kernels as pk
from prime_kernels import _selftest

CASES = _selftest._cases(torch.Generator().manual_seed(0), "cpu")
LINEAR = ["pack", "segment_scan", "segment_sum", "step_rewards", "unpack"]
# Plain PyTorch but for the sum of each response, which is linear.
LINEAR_ON_CPU = ["prm_loss"]
OTHERS = [
    "distribution_ppo_loss",
    "linear_log_probs",
    "linear_log_ratios",
    "linear_nll",
    "linear_ppo_loss",
    "log_probs",
    "log_ratios",
    "ppo_loss",
]


def gradient(op, backend, power, leaf, leaves):
    """That of the first tensor of an operation's case, of which a graph is made."""
    results = CASES[op][0](backend, leaf, *leaves[1:])
    total = sum((each.double() ** power).sum() for each in results if each.requires_grad)
    return torch.autograd.grad(total, leaf, create_graph=True)[0]


@pytest.mark.parametrize("op", LINEAR + LINEAR_ON_CPU)
def test_right(op, backend):
    if op in LINEAR_ON_CPU and backend not in ("eager", "cpu"):
        pytest.skip("a kernel without second derivatives on this backend: see below")
    leaves = CASES[op][1]
    found = {}
    for name in {backend, "eager"}:
        leaf = leaves[0].clone().requires_grad_()
        (gradient(op, name, 3, leaf, leaves) ** 2).sum().backward()
        found[name] = leaf.grad
    assert found["eager"].any()
    torch.testing.assert_close(found[backend], found["eager"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("power", [1, 2], ids=["constant upstream gradient", "upstream gradient with a graph"])
@pytest.mark.parametrize("op", OTHERS + LINEAR_ON_CPU)
def test_refused(op, power, backend):
    if backend == "eager" or (backend == "cpu" and op in LINEAR_ON_CPU):
        pytest.skip("plain PyTorch, which has all derivatives")
    leaves = CASES[op][1]
    leaf = leaves[0].clone().requires_grad_()
    # Beside another loss, where nothing but a wrong value would tell.
    total = gradient(op, backend, power, leaf, leaves).square().sum() + leaf.square().sum()
    with pytest.raises(RuntimeError, match=r"expected a first derivative, got a second one.*backend='eager'"):
        total.backward()


@pytest.mark.parametrize("op", OTHERS)
def test_a_graph_that_is_not_differentiated_is_no_error(op, backend):
    """create_graph=True for the sake of another loss."""
    leaves = CASES[op][1]
    leaf = leaves[0].clone().requires_grad_()
    made = gradient(op, backend, 1, leaf, leaves)
    plain = leaves[0].clone().requires_grad_()
    results = CASES[op][0](backend, plain, *leaves[1:])
    sum(each.double().sum() for each in results if each.requires_grad).backward()
    assert torch.equal(made.detach(), plain.grad)


def test_prefix_loss_refuses_second_derivatives(backend):
    """Though the other kinds of "prm_loss" have them on CPUs."""
    outcomes, cu = torch.tensor([1.0, 0.0]), torch.tensor([0, 3, 5])
    x = torch.randn(5, requires_grad=True)

    def run(y):
        return pk.prm_loss(y, outcomes, cu, kind="prefix", beta=1.0, margin=0.5, backend=backend).loss

    if backend == "eager":
        assert torch.autograd.gradgradcheck(run, x.detach().double().requires_grad_())
    else:
        (made,) = torch.autograd.grad(run(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"prm_loss: expected a first derivative, got a second one"):
            (made.sum() + x.square().sum()).backward()
