"""Log-probs straight from hidden states, against eager PyTorch, torch.compile of it and the bare matrix product."""

import pytest
import torch
from measure import DEVICE, SMALL, backward_alone, compiled, forward_backward, leaf, timed, without_gradients

import prime_kernels as pk
from prime_kernels import _tuning
from prime_kernels._bench import formulas, operations
from prime_kernels.integrations import tile_sizes

TOKENS, WIDTH, VOCABULARY = (8192, 4096, 131072) if DEVICE == "cuda" else (1024, 576, 49152)
if SMALL:
    TOKENS, WIDTH, VOCABULARY = 8, 16, 256
FLOPS = 2 * TOKENS * WIDTH * VOCABULARY


def peer_nll(**options):
    """torch's own loss from hidden states; with chunks where this torch has them."""

    def loss(hidden, weight, ids):
        return torch.nn.functional.linear_cross_entropy(hidden, weight, ids, **options)

    return loss


def tuned(function, **tiles):
    """``function`` with these sizes of tiles in place of the built-in ones."""

    def run(*columns):
        with _tuning.trial(_tuning.none(DEVICE)._replace(tiles=tiles)):
            return function(*columns)

    return run


def ways(plain, kernel):
    return {"eager": plain, "compile": compiled(plain), "kernel": kernel}


WAYS = ways(formulas.linear_log_probs, pk.linear_log_probs)
# As where there is too little memory to keep logits for their gradient.
BOTH_WAYS = WAYS | {"kernel, logits recomputed": tuned(pk.linear_log_probs, kept_bytes=1)}
NLL = ways(formulas.linear_nll, pk.linear_nll)
if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (9, 0):
    for columns in (256, 128):
        name = f"kernel, softmax in the product, {columns} columns"
        WAYS[name] = BOTH_WAYS[name] = tuned(pk.linear_log_probs, fused_columns=columns)
        NLL[name] = tuned(pk.linear_nll, fused_columns=columns)
if hasattr(torch.nn.functional, "linear_cross_entropy"):
    NLL["linear_cross_entropy"] = peer_nll()
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        NLL["linear_cross_entropy, chunks"] = peer_nll(options=torch.nn.LinearCrossEntropyOptions())
PPO = ways(formulas.linear_ppo_loss, operations.linear_ppo_loss)
RATIOS = ways(formulas.linear_log_ratios, operations.linear_log_ratios)


@pytest.fixture
def inputs():
    ids = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)
    return leaf(TOKENS, WIDTH), leaf(VOCABULARY, WIDTH, scale=0.1), ids


def error(logp, inputs):
    """The largest error of some tokens' log-probs, in nats, against float64 of the same inputs."""
    hidden, weight, ids = inputs[0][:512].detach().double(), inputs[1].detach().double(), inputs[2][:512]
    exact = (hidden @ weight.T).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)
    return f"{(logp[: len(ids)].double() - exact).abs().max().item():.1e}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.benchmark(group="linear_log_probs, forward")
def test_forward(benchmark, inputs, way):
    timed(benchmark, without_gradients(lambda: WAYS[way](*inputs)), flops=FLOPS)
    with torch.no_grad():
        benchmark.extra_info["worst error"] = error(WAYS[way](*inputs), inputs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.benchmark(group="linear_log_probs, forward")
def test_product_alone(benchmark, inputs, dtype):
    """Into a buffer that is there already: what no kernel on top of a library product can beat.

    Processors without bfloat16 instructions multiply float32 faster; the faster of the two is the one to compare with.
    """
    hidden, weight = (each.detach().to(getattr(torch, dtype)) for each in inputs[:2])
    buffer = torch.empty(TOKENS, VOCABULARY, dtype=hidden.dtype, device=DEVICE)
    timed(benchmark, without_gradients(lambda: torch.mm(hidden, weight.T, out=buffer)), flops=FLOPS)


@pytest.mark.parametrize("way", RATIOS)
@pytest.mark.benchmark(group="linear_log_ratios of three models, forward")
def test_ratios(benchmark, inputs, way):
    hidden, weight, ids = inputs
    others = [leaf(TOKENS, WIDTH) for _ in range(2)]
    timed(benchmark, without_gradients(lambda: RATIOS[way](hidden, *others, weight, ids)), flops=3 * FLOPS)


@pytest.mark.parametrize("way", NLL)
@pytest.mark.benchmark(group="linear_nll, forward and backward")
def test_nll(benchmark, inputs, way):
    timed(benchmark, forward_backward(lambda: NLL[way](*inputs), list(inputs[:2])), flops=3 * FLOPS)


@pytest.mark.parametrize("way", PPO)
@pytest.mark.benchmark(group="linear_ppo_loss, forward and backward")
def test_ppo(benchmark, inputs, way):
    hidden, weight, ids = inputs
    with torch.no_grad():
        old = pk.linear_log_probs(hidden, weight, ids) + 0.1 * torch.randn(TOKENS, device=DEVICE)
    columns = (hidden, weight, ids, old, torch.randn(TOKENS, device=DEVICE))
    timed(benchmark, forward_backward(lambda: PPO[way](*columns), [hidden, weight]), flops=3 * FLOPS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.benchmark(group="linear_nll, forward and backward")
def test_three_products_alone(benchmark, inputs, dtype):
    """Logits and both gradients into buffers that are there already."""
    hidden, weight = (each.detach().to(getattr(torch, dtype)) for each in inputs[:2])
    buffer = torch.empty(TOKENS, VOCABULARY, dtype=hidden.dtype, device=DEVICE)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def products():
        torch.mm(hidden, weight.T, out=buffer)
        torch.mm(buffer, weight, out=grad_hidden)
        torch.mm(buffer.T, hidden, out=grad_weight)

    timed(benchmark, without_gradients(products), flops=3 * FLOPS)


@pytest.mark.parametrize("tokens", [1024, 8192, 65536])
@pytest.mark.benchmark(group="memory of linear_log_probs forward, vocabulary of 151936")
def test_memory(benchmark, tokens):
    """Beyond inputs and results: the same for any number of tokens. The width is small, as it does not matter here."""
    tokens, vocabulary = (64, 512) if SMALL else (tokens, 151936)
    hidden, weight = leaf(tokens, 16), leaf(vocabulary, 16)
    ids = torch.randint(vocabulary, (tokens,), device=DEVICE)
    timed(benchmark, without_gradients(lambda: pk.linear_log_probs(hidden, weight, ids)), rounds=1)


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.benchmark(group="linear_log_probs, forward and backward")
def test_backward(benchmark, inputs, way):
    timed(benchmark, forward_backward(lambda: BOTH_WAYS[way](*inputs), list(inputs[:2])), flops=3 * FLOPS)


@pytest.mark.parametrize("way", BOTH_WAYS)
@pytest.mark.benchmark(group="linear_log_probs, backward alone")
def test_backward_alone(benchmark, inputs, way):
    """Two products, and where the kernels do not keep the logits a third that makes them again."""
    leaves = list(inputs[:2])
    few = tile_sizes(DEVICE).kept_bytes >= 4 * TOKENS * VOCABULARY
    kept = few if way.startswith("kernel") and "recomputed" not in way else way in ("eager", "compile")
    call, before = backward_alone(lambda: BOTH_WAYS[way](*inputs), leaves)
    timed(benchmark, call, flops=(2 if kept else 3) * FLOPS, before=before)
