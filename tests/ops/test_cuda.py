"""CUDA tensors: results agree with the CPU, and nothing waits for the GPU unless its documentation says so."""

import pytest
import torch
from helpers.support import TOLERANCES, offsets

import prime_kernels as pk
from prime_kernels import _tuning

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS, VOCABULARY = 12, 301
MASK = torch.arange(TOKENS) % 5 != 2


def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (TOKENS,))
    return {
        "logits": torch.randn(TOKENS, VOCABULARY),
        "other": torch.randn(TOKENS, VOCABULARY),
        "hidden": torch.randn(TOKENS, 16),
        "weight": torch.randn(VOCABULARY, 16),
        "ids": ids.where(MASK, -1),
        "mask": MASK,
        "x": torch.randn(TOKENS),
        "y": torch.randn(TOKENS),
        "cu": offsets([5, 0, 1, 4, 2]),
        "steps": offsets([2, 3, 1, 4, 2]),
        "groups": offsets([3, 2]),
        "outcomes": torch.tensor([1.0, 0.0, 0.3, 1.0, 0.0]),
    }


# Operation, argument it is differentiated by, and whether it is documented to wait for the device.
OPERATIONS = {
    "log_probs": (lambda a: pk.log_probs(a["logits"], a["ids"], mask=a["mask"], with_entropy=True), "logits", False),
    "log_ratios": (lambda a: pk.log_ratios(a["logits"], a["other"], a["ids"], mask=a["mask"])[:3], "logits", False),
    "linear": (lambda a: [pk.linear_log_probs(a["hidden"], a["weight"], a["ids"].clamp(0))], "weight", False),
    "linear masked": (
        lambda a: [pk.linear_log_probs(a["hidden"], a["weight"], a["ids"], mask=a["mask"])],
        "weight",
        True,
    ),
    "segment_scan": (lambda a: [pk.segment_scan(a["x"], a["cu"], gamma=0.9, reverse=True)], "x", False),
    "segment_sum": (lambda a: [pk.segment_sum(a["x"], a["cu"])], "x", False),
    "step_rewards": (lambda a: [pk.step_rewards(a["x"], a["steps"], a["cu"], mode="cumulative")], "x", False),
    "rloo": (lambda a: pk.rloo_advantages(a["x"], a["outcomes"], a["cu"], a["groups"]), None, False),
    "ppo_loss": (lambda a: pk.ppo_loss(a["x"], a["y"], a["y"], mask=a["mask"])[:1], "x", False),
    "prm_loss ce": (lambda a: pk.prm_loss(a["x"], a["outcomes"], a["cu"])[:1], "x", False),
    "prm_loss prefix": (lambda a: pk.prm_loss(a["x"], a["outcomes"], a["cu"], kind="prefix")[:1], "x", False),
    "prm_loss dpo": (
        lambda a: pk.prm_loss(a["x"], a["outcomes"], a["cu"], cu_groups=a["groups"], kind="dpo")[:1],
        "x",
        True,
    ),
}


@pytest.mark.parametrize("kernels", ["eager", "triton", "cuda"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_the_cpu_without_waiting(name, kernels):
    """An operation that a backend does not have runs on the fastest of the rest."""
    reason = pk.available_backends()[kernels]
    if reason is not None:
        pytest.skip(f"backend {kernels!r}: {reason}")
    with pk.use_backend(kernels):
        check_agreement(*OPERATIONS[name])


def check_agreement(call, leaf, waits):
    results = []
    for device in ("cpu", "cuda"):
        arguments = {key: value.to(device) for key, value in inputs().items()}
        if leaf:
            arguments[leaf].requires_grad_()
        call(arguments)  # The first call may wait for libraries to load.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if waits or device == "cpu" else "error")
        try:
            outputs = list(call(arguments))
            if leaf:
                torch.stack([output.sum() for output in outputs]).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append([output.detach().cpu() for output in outputs] + ([arguments[leaf].grad.cpu()] if leaf else []))
    absolute, relative = TOLERANCES["grad.float32"]
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, atol=10 * absolute, rtol=10 * relative)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kept_logits_give_the_same_bits(backend):
    """Three tiles each way; the products of a kept one write longer rows."""
    hidden = torch.randn(2048, 512, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(151936, 512, device="cuda").bfloat16().requires_grad_()
    ids, found = torch.randint(151936, (2048,), device="cuda"), []
    for size in (1, 2**31):
        with _tuning.trial(_tuning.none("cuda")._replace(tiles={"kept_bytes": size})):
            logp = pk.linear_log_probs(hidden, weight, ids, backend=backend)
            found.append([logp.detach(), *torch.autograd.grad(logp.sum(), [hidden, weight])])
    assert all(map(torch.equal, *found))
