"""The operations inside torch.compile: the numbers and the errors of the eager call, log-probs in one graph."""

import pytest
import torch
from torch.library import opcheck

import prime_kernels as pk

ROWS, VOCABULARY = 6, 131


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def inputs(dtype=torch.float32):
    prm, ref, policy = ((torch.randn(2, 3, VOCABULARY) * 3).to(dtype) for _ in range(3))
    ids = torch.randint(VOCABULARY, (2, 3))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    return prm.requires_grad_(), ref, policy.requires_grad_(), ids.where(mask, -1), mask


def results_and_gradients(function, leaves):
    outputs = [each for each in function() if each is not None]
    upstream = [(each, torch.linspace(-1.0, 2.0, each.numel()).view(each.shape)) for each in outputs]
    torch.autograd.backward(*zip(*[pair for pair in upstream if pair[0].requires_grad], strict=True))
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [each.detach() for each in outputs] + [torch.tensor([each.requires_grad for each in outputs])] + gradients


def assert_same(compiled, eager):
    for got, want in zip(compiled, eager, strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_entropy", [True, False])
def test_log_probs_in_one_graph(backend, with_entropy, dtype):
    logits, _, _, ids, mask = inputs(dtype)

    def call():
        found = pk.log_probs(logits, ids, mask=mask, temperature=0.7, with_entropy=with_entropy, backend=backend)
        return [2.0 * each for each in (found if with_entropy else [found])]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, [logits]), results_and_gradients(call, [logits]))


@pytest.mark.parametrize("with_policy", [True, False])
def test_log_ratios_in_one_graph(backend, with_policy):
    prm, ref, policy, ids, mask = inputs()
    models = {"policy_logits": policy, "policy_temperature": 0.9} if with_policy else {}

    def call():
        return pk.log_ratios(prm, ref, ids, mask=mask, backend=backend, **models)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    leaves = [prm, policy] if with_policy else [prm]
    assert compiled().policy_logp is None or with_policy
    assert_same(results_and_gradients(compiled, leaves), results_and_gradients(call, leaves))
    same = torch.compile(lambda: pk.log_ratios(prm, prm, ids, mask=mask).log_ratio, fullgraph=True, backend="aot_eager")
    assert bool((same() == 0).all())


def test_mixed_with_other_code_by_the_default_compiler(backend):
    hidden, weight = torch.randn(5, 8), torch.randn(64, 8, requires_grad=True)
    ids = torch.randint(64, (5,))

    def loss(weight):
        logp, entropy = pk.log_probs(hidden @ weight.T, ids, with_entropy=True, backend=backend)
        return (-logp - 0.01 * entropy).mean()

    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(weight), weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(loss(weight), weight)[0], rtol=1e-5, atol=1e-6)


def test_sizes_may_change(backend):
    compiled = torch.compile(
        lambda logits, ids: pk.log_probs(logits, ids, backend=backend),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for rows in (1, 4, 7):
        logits, ids = torch.randn(rows, 33), torch.randint(33, (rows,))
        torch.testing.assert_close(compiled(logits, ids), pk.log_probs(logits, ids), rtol=1e-6, atol=1e-6)


def test_errors_are_those_of_the_eager_call(backend):
    compiled = torch.compile(lambda z, ids: pk.log_probs(z, ids, backend=backend), fullgraph=True, backend="aot_eager")
    logits, ids = torch.randn(3, 9), torch.tensor([1, 9, 2])
    with pytest.raises(IndexError, match=r"ids: expected labels in \[0, 9\), got 9 at \[1\]"):
        compiled(logits, ids)
    with pytest.raises(ValueError, match=r"temperature: expected a finite number"):
        torch.compile(
            lambda z: pk.log_probs(z, ids - 1, temperature=0.0, backend=backend), fullgraph=True, backend="aot_eager"
        )(logits)


def test_inplace_backward_leaves_the_logits_alone_in_a_graph(backend):
    logits, _, _, ids, mask = inputs()
    before = logits.detach().clone()

    def call(inplace):
        return [pk.log_probs(logits, ids, mask=mask, inplace_backward=inplace, backend=backend)]

    compiled = torch.compile(lambda: call(True), fullgraph=True, backend="aot_eager")
    got = results_and_gradients(compiled, [logits])
    assert torch.equal(logits, before)
    assert_same(got, results_and_gradients(lambda: call(False), [logits]))


@pytest.mark.parametrize("with_entropy", [True, False])
def test_operators_keep_their_promises(backend, with_entropy):
    prm, ref, policy, ids, mask = inputs()
    ops = torch.ops.prime_kernels
    opcheck(ops.log_probs.default, (prm, ids, mask, 0.7, 3.0, with_entropy, backend))
    opcheck(ops.log_probs.default, (prm.detach()[:, :, ::2], ids.clamp(0, 60), None, 1.0, None, with_entropy, backend))
    opcheck(ops.log_ratios.default, (prm, ref, ids, policy, mask, 0.9, 3.0, backend))
    opcheck(ops.log_ratios.default, (prm, ref, ids, None, mask, 1.0, None, backend))
    logp, lse, entropy = ops.log_probs(prm.detach(), ids, mask, 0.7, 3.0, with_entropy, backend)
    upstream = (torch.randn_like(logp), torch.randn_like(logp) if with_entropy else None)
    columns = (ids, mask, lse, entropy if with_entropy else None, *upstream)
    opcheck(ops.log_probs_backward.default, (prm.detach(), *columns, 0.7, 3.0, backend))


def linear_inputs(dtype=torch.float32):
    leaves = torch.randn(2, 3, 8), torch.randn(VOCABULARY, 8), torch.randn(VOCABULARY)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    ids = torch.randint(VOCABULARY, (2, 3)).where(mask, -1)
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], ids, mask


@pytest.mark.parametrize("with_entropy", [True, False])
def test_linear_log_probs_in_one_graph(backend, with_entropy):
    leaves, ids, mask = linear_inputs()
    hidden, weight, bias = leaves

    def call():
        options = {"bias": bias, "mask": mask, "temperature": 0.7, "with_entropy": with_entropy, "backend": backend}
        found = pk.linear_log_probs(hidden, weight, ids, **options)
        return list(found) if with_entropy else [found]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, leaves), results_and_gradients(call, leaves))


def test_linear_losses_and_ratios_in_one_graph(backend):
    (hidden, weight, _), ids, mask = linear_inputs()
    columns = torch.randn(2, 3) - 5.0, torch.randn(2, 3)

    def call():
        head = pk.Head(hidden, weight)
        ratios = pk.linear_log_ratios(head, head, ids, policy=head, mask=mask, backend=backend)
        nll = pk.linear_nll(hidden, weight, ids, mask=mask, backend=backend)
        ppo = pk.linear_ppo_loss(hidden, weight, ids, *columns, mask=mask, backend=backend)
        return [ratios.log_ratio, ratios.policy_logp, nll, *ppo]

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(results_and_gradients(compiled, [hidden, weight]), results_and_gradients(call, [hidden, weight]))


def test_linear_operator_keeps_its_promises(backend):
    (hidden, weight, bias), ids, mask = linear_inputs()
    op = torch.ops.prime_kernels.linear_log_probs.default
    opcheck(op, (hidden, weight, ids, bias, mask, 0.7, 3.0, True, "float32", backend))
    opcheck(op, (hidden.detach(), weight, ids.clamp(0), None, None, 1.0, None, False, "input", backend))
    opcheck(op, (hidden, weight.detach(), ids, bias, torch.zeros_like(mask), 1.0, None, True, "float32", backend))


# One response is as long as real ones: a scan takes thirteen powers of its discount.
CU, GROUPS = torch.tensor([0, 3, 3, 8200, 8207, 8210]), torch.tensor([0, 2, 5])
# Of x in (0, 1), values of the tokens and outcomes of the responses.
OF_NUMBERS = {
    "segment_scan": lambda x, v, o, on: pk.segment_scan(v, CU, gamma=x, reverse=True, backend=on),
    "rloo_advantages": lambda x, v, o, on: (
        pk.rloo_advantages(
            v, o, CU, GROUPS, gamma_process=x, gamma_outcome=1 - x, process_coef=x, outcome_coef=2 * x, backend=on
        ).advantages
    ),
    "ppo_loss": lambda x, v, o, on: (
        pk.ppo_loss(v, v - 0.3, v, clip_low=x, clip_high=x, dual_clip=1 + x, backend=on).loss
    ),
    "prm_loss": lambda x, v, o, on: pk.prm_loss(v, o, CU, beta=x, backend=on).loss,
    "prm_loss of prefixes": lambda x, v, o, on: (
        pk.prm_loss(v, o, CU, kind="prefix", beta=x, margin=2 * x, weights=o + 1, shift=o - 0.5, backend=on).loss
    ),
    "log_probs": lambda x, v, o, on: pk.log_probs(v[:50].view(5, 10), CU[:5] % 10, temperature=x, backend=on),
}


@pytest.mark.parametrize("name", OF_NUMBERS)
def test_numbers_may_change_from_call_to_call(backend, name):
    """The compiler makes a number that has changed once a symbol, on which a loop of powers cannot stop."""
    values, outcomes = torch.randn(8210), torch.randint(2, (5,)).float()
    compiled = torch.compile(OF_NUMBERS[name], backend="aot_eager")
    for x in (0.25, 0.95, 0.5, 0.85):
        want = OF_NUMBERS[name](x, values, outcomes, "eager")
        torch.testing.assert_close(compiled(x, values, outcomes, backend), want, rtol=1e-5, atol=1e-5)
