"""Batches of thousands of tokens, which kernels share between threads, blocks and tiles: every operation on packed
tokens against its float64 reference, values and gradients."""

import pytest
import torch
from helpers.support import assert_close, offsets

import prime_kernels as pk

# (response lengths, group sizes): straddling, filling and ending with whatever a kernel takes at once.
BATCHES = {
    "one response": ([5000], [1]),
    "a giant among short ones": ([3, 1, 0, 4100, 0, 0, 2, 1, 7, 5], [4, 3, 3]),
    "powers of two": ([1024, 1, 511, 512, 2048, 0, 128, 256], [2, 2, 4]),
    "ragged": ([0, 700, 33, 1, 64, 1900, 65, 63, 0, 0, 129, 2, 900, 31, 0], [1, 3, 5, 6]),
    "short ones": ([1, 2, 3] * 300, [4] * 225),
}


@pytest.fixture(params=BATCHES, scope="module")
def batch(request):
    lengths, groups = BATCHES[request.param]
    total, generator = sum(lengths), torch.Generator("cpu").manual_seed(len(lengths))
    values = {
        name: torch.randn(total, generator=generator, device="cpu") for name in ("x", "old", "upstream", "weights")
    }
    outcomes = torch.rand(len(lengths), generator=generator, device="cpu").round(decimals=1)
    mask = torch.rand(total, generator=generator, device="cpu") < 0.7
    device = torch.get_default_device()
    tensors = values | {"outcomes": outcomes, "mask": mask, "cu": offsets(lengths), "groups": offsets(groups)}
    return {name: value.to(device) for name, value in tensors.items()}


def both(call, leaf, upstream, backend):
    """(results and gradient on the backend, the same on the reference in float64)."""
    found = []
    for dtype, where in ((torch.float32, backend), (torch.float64, "eager")):
        x = leaf.to(dtype, copy=True).requires_grad_()
        results = call(x, where)
        results[0].backward(upstream.to(results[0].dtype))
        found.append([*(each.detach() for each in results), x.grad])
    return zip(*found, strict=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.97, 0.2])
def test_scan(backend, batch, gamma, reverse):
    def call(x, where):
        return [pk.segment_scan(x, batch["cu"], gamma=gamma, reverse=reverse, backend=where)]

    for got, want in both(call, batch["x"], batch["upstream"], backend):
        assert_close("sums", got, want)


def test_scans_do_not_leak(backend, batch):
    """What one response holds, NaN included, stays in it."""
    lengths = batch["cu"].diff()
    bad = int(lengths.argmax())
    inside = torch.zeros_like(batch["x"], dtype=torch.bool)
    inside[batch["cu"][bad] : batch["cu"][bad + 1]] = True
    x = batch["x"].masked_fill(inside, torch.nan)
    for reverse in (False, True):
        scanned = pk.segment_scan(x, batch["cu"], gamma=0.9, reverse=reverse, backend=backend)
        assert torch.equal(scanned.isnan(), inside)
    sums = pk.segment_sum(x, batch["cu"], backend=backend)
    assert sums.isnan().nonzero().flatten().tolist() == [bad]


@pytest.mark.parametrize("mode", ["single", "cumulative"])
def test_step_rewards(backend, batch, mode):
    total = batch["x"].numel()
    cuts = torch.arange(0, total, 37)
    steps = torch.cat((cuts, batch["cu"], batch["cu"])).sort().values
    for got, want in both(
        lambda x, where: [pk.step_rewards(x, steps, batch["cu"], mode=mode, backend=where)],
        batch["x"],
        torch.randn(steps.numel() - 1),
        backend,
    ):
        assert_close("sums", got, want)


@pytest.mark.parametrize("baseline", ["reference", "paper"])
@pytest.mark.parametrize("masked, normalize, gammas", [(False, True, (1.0, 1.0)), (True, False, (0.95, 0.9))])
def test_rloo(backend, batch, baseline, masked, normalize, gammas):
    options = {"normalize_process": normalize, "process_baseline": baseline, "process_coef": 2.0}
    options |= {"gamma_process": gammas[0], "gamma_outcome": gammas[1]}
    mask = batch["mask"] if masked else None
    tensors = (batch["outcomes"], batch["cu"], batch["groups"])
    # What carries no reward is not read.
    x = batch["x"] if mask is None else batch["x"].masked_fill(~mask, torch.nan)
    got = pk.rloo_advantages(x, *tensors, reward_mask=mask, backend=backend, **options)
    want = pk.rloo_advantages(x.double(), *tensors, reward_mask=mask, backend="eager", **options)
    extent = float(want.returns.abs().max())
    assert_close("sums", got.returns, want.returns, extent=extent)
    assert_close("sums", got.advantages, want.advantages, extent=float(want.advantages.abs().max()))


@pytest.mark.parametrize("whiten", [True, False])
def test_rloo_of_outcomes_alone(backend, batch, whiten):
    tensors = (batch["cu"], batch["groups"])
    options = {"whiten": whiten, "gamma_outcome": 0.99}
    got = pk.rloo_advantages(None, batch["outcomes"], *tensors, backend=backend, **options)
    want = pk.rloo_advantages(None, batch["outcomes"].double(), *tensors, backend="eager", **options)
    assert_close("sums", got.returns, want.returns)
    assert_close("sums", got.advantages, want.advantages, extent=float(want.advantages.abs().max()))


@pytest.mark.parametrize(
    "masked, weighted, denominator", [(False, False, None), (True, True, 7.5), (True, False, "one")]
)
def test_ppo_loss(backend, batch, masked, weighted, denominator):
    mask = batch["mask"] if masked else None
    if denominator == "one":
        denominator = torch.tensor(123)
    keep = torch.ones_like(batch["mask"]) if mask is None else mask

    def call(x, where):
        columns = (x.masked_fill(~keep, torch.nan), batch["old"].to(x.dtype), batch["upstream"].to(x.dtype))
        weights = batch["weights"].to(x.dtype) if weighted else None
        options = {"mask": mask, "weights": weights, "denominator": denominator, "backend": where}
        return pk.ppo_loss(*columns, **options)

    for got, want in both(call, batch["x"], torch.tensor(0.7), backend):
        assert_close("grad.float32", got, want, extent=float(want.abs().max()))


@pytest.mark.parametrize(
    "kind, balanced",
    [("ce", False), ("ce", True), ("dpo", False), ("kto", False), ("nca", False), ("prefix", False), ("prefix", True)],
)
def test_prm_loss(backend, batch, kind, balanced):
    outcomes = batch["outcomes"]
    options = {"weights": 1.5 - outcomes, "shift": outcomes - 0.5} if balanced else {}
    options |= {"kind": kind, "beta": 3.0 if kind == "prefix" else 0.05, "margin": 0.5, "cu_groups": batch["groups"]}

    def call(x, where):
        return pk.prm_loss(x, outcomes, batch["cu"], backend=where, **options)

    for got, want in both(call, batch["x"], torch.tensor(1.3), backend):
        assert_close("sums", got, want)


def test_the_same_bits_again(backend, batch):
    def run():
        x = batch["x"].clone().requires_grad_()
        columns = (batch["outcomes"], batch["cu"], batch["groups"])
        loss = pk.prm_loss(x, batch["outcomes"], batch["cu"], cu_groups=batch["groups"], kind="nca", backend=backend)
        prefix = pk.prm_loss(x, batch["outcomes"], batch["cu"], kind="prefix", backend=backend)
        ppo = pk.ppo_loss(x, batch["old"], batch["upstream"], mask=batch["mask"], backend=backend)
        (loss.loss + prefix.loss + ppo.loss).backward()
        rloo = pk.rloo_advantages(batch["x"], *columns, gamma_process=0.9, backend=backend)
        scan = pk.segment_scan(batch["x"], batch["cu"], gamma=0.9, backend=backend)
        return [*rloo, scan, x.grad, loss.loss.detach(), prefix.loss.detach(), ppo.loss.detach()]

    first = run()
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_pack_and_unpack(backend, batch, padding):
    lengths = batch["cu"].diff()
    wide = int(lengths.max()) + 3
    padded = pk.unpack(batch["x"], batch["cu"], length=wide, padding=padding, fill=-9.5, backend=backend)
    for row, (begin, end) in enumerate(zip(batch["cu"][:-1].tolist(), batch["cu"][1:].tolist(), strict=True)):
        blank = torch.full((wide - (end - begin),), -9.5)
        tokens = batch["x"][begin:end]
        assert torch.equal(padded[row], torch.cat((tokens, blank) if padding == "right" else (blank, tokens)))
    packed = pk.pack(padded, batch["cu"], padding=padding, backend=backend)
    assert torch.equal(packed, batch["x"])
