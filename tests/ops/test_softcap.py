"""Capped logits, c * tanh(z / c) before the temperature: values, entropies and gradients of every operation that takes
log-probs, against float64."""

import math

import pytest
import torch

import prime_kernels as pk
from prime_kernels.ops import _softcap, _tiled_head

CAP, TEMPERATURE, VOCABULARY = 3.0, 0.7, 67
# Of log-probs, in nats, and of gradients as a share of the largest: the product's logits are rounded to the dtype.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def exact(z, ids, temperature=TEMPERATURE, cap=CAP):
    log_p = (cap * torch.tanh(z / cap) / temperature).log_softmax(-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def tensors(dtype, tokens=23, width=8):
    """Logits of up to three times the cap."""
    leaves = [torch.randn(tokens, width), torch.randn(VOCABULARY, width), torch.randn(VOCABULARY)]
    ids = torch.randint(VOCABULARY, (tokens,))
    return [leaf.to(dtype).requires_grad_() for leaf in leaves], ids


def compare(got, want, share):
    for one, other in zip(got, want, strict=True):
        assert (one.double() - other).abs().max() <= share * max(1.0, other.abs().max().item())


@pytest.fixture(params=["as they come", "one tile", "tiles"])
def tiles(request, monkeypatch):
    """By the kernels of whole heads where a backend has them, or by tiles."""
    if request.param != "as they come":
        monkeypatch.setattr(_tiled_head, "HEAD_KERNELS", frozenset())
    if request.param == "tiles":
        for name in ("TOKENS", "FORWARD_ELEMENTS", "BACKWARD_ELEMENTS"):
            monkeypatch.setattr(_tiled_head, name, {"cpu": 5 if name == "TOKENS" else 100, "cuda": 100})
        monkeypatch.setattr(_tiled_head, "FUSED_BYTES", 4 * 7 * VOCABULARY)


@pytest.fixture(params=["one block", "blocks"])
def blocks(request, monkeypatch):
    """Capped logits of all rows at once, or of two at a time."""
    if request.param == "blocks":
        elements = {"cpu": 2 * VOCABULARY // torch.get_num_threads() + 1, "cuda": 2 * VOCABULARY}
        monkeypatch.setattr(_softcap, "BLOCK_ELEMENTS", elements)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_log_probs(backend, dtype, inplace, blocks):
    z = (4 * torch.randn(2, 9, VOCABULARY)).to(dtype)
    ids, mask = torch.randint(VOCABULARY, (2, 9)), torch.rand(2, 9) < 0.7
    z[~mask] = math.nan
    leaf, want_leaf = z.clone().requires_grad_(), z.double().masked_fill(~mask[..., None], 0.0).requires_grad_()
    given = leaf * 1 if inplace else leaf
    found = pk.log_probs(
        given, ids, mask=mask, temperature=TEMPERATURE, softcap=CAP, with_entropy=True, inplace_backward=inplace,
        backend=backend,
    )  # fmt: skip
    want = [column.masked_fill(~mask, 0.0) for column in exact(want_leaf, ids)]
    compare(found, want, 1e-5)
    up = torch.randn(2, 2, 9)
    (got,) = torch.autograd.grad((found[0] * up[0] + found[1] * up[1]).sum(), leaf)
    (wanted,) = torch.autograd.grad((want[0] * up[0] + want[1] * up[1]).sum(), want_leaf)
    assert got.dtype == dtype and torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    assert torch.equal(given.detach().nan_to_num(7.0), got) == inplace
    compare([got], [wanted], {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}[dtype])
    without = pk.log_probs(z.nan_to_num(0.0), ids, mask=mask, temperature=TEMPERATURE, backend=backend)
    assert (without - found[0]).abs().max() > 1


def test_log_ratios_of_three_models(backend, blocks):
    prm, ref, policy = (4 * torch.randn(11, VOCABULARY) for _ in range(3))
    ids, leaf, exact_leaf = (
        torch.randint(VOCABULARY, (11,)),
        prm.clone().requires_grad_(),
        prm.double().requires_grad_(),
    )
    found = pk.log_ratios(
        leaf, ref, ids, policy_logits=policy, policy_temperature=TEMPERATURE, softcap=CAP, backend=backend
    )
    want = [exact(exact_leaf, ids, 1.0)[0], exact(ref.double(), ids, 1.0)[0], exact(policy.double(), ids)[0]]
    compare(found, [want[0] - want[1], *want], 1e-5)
    up = torch.randn(11)
    compare(
        torch.autograd.grad(found.log_ratio @ up, leaf), torch.autograd.grad(want[0] @ up.double(), exact_leaf), 1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_log_probs(backend, dtype, tiles):
    (hidden, weight, bias), ids = tensors(dtype)
    mask = torch.rand(len(ids)) < 0.7
    found = pk.linear_log_probs(
        hidden, weight, ids, bias=bias, mask=mask, temperature=TEMPERATURE, softcap=CAP, with_entropy=True,
        backend=backend,
    )  # fmt: skip
    doubles = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight, bias)]
    want = [c.where(mask, 0.0) for c in exact(doubles[0] @ doubles[1].T + doubles[2], ids)]
    compare(found, want, ROUNDING[dtype])
    up = torch.randn(2, len(ids))
    got = torch.autograd.grad((found[0] * up[0] + found[1] * up[1]).sum(), (hidden, weight, bias))
    wanted = torch.autograd.grad((want[0] * up[0] + want[1] * up[1]).sum(), doubles)
    compare(got, wanted, ROUNDING[dtype])


def test_a_cap_keeps_no_capped_logits(backend):
    """What a kernel keeps for the gradient are the logits themselves and columns."""
    if backend == "eager":
        pytest.skip("PyTorch's own operations keep what each of them needs")
    logits = torch.randn(8, VOCABULARY).bfloat16().requires_grad_()
    ids, kept = torch.randint(VOCABULARY, (8,)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        pk.log_probs(logits, ids, softcap=CAP, backend=backend)
        pk.log_ratios(logits, logits, ids, softcap=CAP, backend=backend)
    assert len(kept) >= 4
    assert all(t.numel() < VOCABULARY or t.data_ptr() == logits.data_ptr() for t in kept)


def test_three_heads_of_different_kinds(backend):
    """A plain head, a scaled one and one that is scaled and capped, in one call."""
    heads, wants, ids = [], [], None
    for scale, cap in ((1.0, None), (0.25, None), (2.0, CAP)):
        leaves, ids = tensors(torch.float32) if ids is None else (tensors(torch.float32)[0], ids)
        z = scale * (leaves[0] @ leaves[1].T + leaves[2]).double()
        heads.append(pk.Head(*leaves, scale=scale, softcap=cap))
        temperature = TEMPERATURE if len(heads) == 3 else 1.0
        if cap is None:
            wants.append((z / temperature).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        else:
            wants.append(exact(z, ids, temperature, cap)[0])
    found = pk.linear_log_ratios(*heads[:2], ids, policy=heads[2], policy_temperature=TEMPERATURE, backend=backend)
    compare(found, [wants[0] - wants[1], *wants], 1e-5)
    up = torch.randn(len(ids))
    leaves = [*heads[0][:3], *heads[2][:3]]
    got = torch.autograd.grad((found.log_ratio + found.policy_logp) @ up, leaves)
    compare(got, torch.autograd.grad((wants[0] + wants[2]) @ up.double(), leaves), 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", ["linear_nll", "linear_ppo_loss"])
def test_fused_losses(backend, dtype, operation, tiles):
    leaves, ids = tensors(dtype)
    advantages = torch.randn(len(ids))
    options = {"bias": leaves[2], "temperature": TEMPERATURE, "softcap": CAP, "backend": backend}
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logp = exact(doubles[0] @ doubles[1].T + doubles[2], ids)[0]
    if operation == "linear_nll":
        loss, want = pk.linear_nll(*leaves[:2], ids, **options), -logp.mean()
    else:
        loss = pk.linear_ppo_loss(*leaves[:2], ids, None, advantages, **options).loss
        want = pk.ppo_loss(logp, logp.detach(), advantages.double(), backend="eager").loss
    compare([loss.detach()], [want.detach()], ROUNDING[dtype])
    compare(torch.autograd.grad(loss, leaves), torch.autograd.grad(want, doubles), ROUNDING[dtype])


def test_compiled(backend):
    (hidden, weight, bias), ids = tensors(torch.float32)

    def both(hidden):
        logits = pk.log_probs(hidden @ weight.T + bias, ids, temperature=TEMPERATURE, softcap=CAP, backend=backend)
        return logits + pk.linear_log_probs(
            hidden, weight, ids, bias=bias, temperature=TEMPERATURE, softcap=CAP, backend=backend
        )

    found = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden)
    want = exact((hidden @ weight.T + bias).double(), ids)[0]
    compare([found], [2 * want], 1e-5)
    up = torch.randn(len(ids))
    compare(torch.autograd.grad(found @ up, hidden), torch.autograd.grad(2 * want @ up.double(), hidden), 1e-5)


@pytest.mark.parametrize(
    ("softcap", "error"), [(0.0, ValueError), (-1.0, ValueError), (math.nan, ValueError), ("3", TypeError)]
)
def test_a_cap_that_is_none(backend, softcap, error):
    (hidden, weight, _), ids = tensors(torch.float32)
    logits = hidden @ weight.T
    with pytest.raises(error, match="softcap: expected a"):
        pk.log_probs(logits, ids, softcap=softcap, backend=backend)
    with pytest.raises(error, match="softcap: expected a"):
        pk.log_ratios(logits, logits, ids, softcap=softcap, backend=backend)
    with pytest.raises(error, match="softcap: expected a"):
        pk.linear_nll(hidden, weight, ids, softcap=softcap, backend=backend)
    head = pk.Head(hidden, weight, softcap=softcap)
    with pytest.raises(error, match=r"prm\.softcap: expected a"):
        pk.linear_log_ratios(head, head, ids, backend=backend)
    with pytest.raises(ValueError, match=r"ref\.scale: expected a"):
        pk.linear_log_ratios(pk.Head(hidden, weight), pk.Head(hidden, weight, scale=0.0), ids, backend=backend)
