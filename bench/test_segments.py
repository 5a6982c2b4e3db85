"""What lies between log-probs and backward, on packed responses of very different lengths.

A loop over groups and time steps, padded, as public trainers have it; the vectorised reference; the kernels.
"""

import functools

import pytest
import torch
from measure import DEVICE, SMALL, compiled, forward_backward, timed, without_gradients

import prime_kernels as pk
from prime_kernels._bench import operations
from prime_kernels._bench.operations import GROUP

TOKENS, RESPONSES = (256, 8) if SMALL else (1_500_000, 1024)


@pytest.fixture(scope="module")
def batch():
    return operations.packed(TOKENS, RESPONSES, torch.device(DEVICE))


def loop(batch, gamma):
    """Padded, group by group and time step by time step."""
    lengths = batch.cu.diff()
    longest = int(lengths.max())
    padded = torch.nn.utils.rnn.pad_sequence(batch.rewards.split(lengths.tolist()), batch_first=True)
    mask = torch.arange(longest)[None] < lengths[:, None]
    process = torch.zeros_like(padded)
    outcome = torch.zeros_like(padded)
    scale = padded.flip(1).cumsum(1).abs().max()
    means = (padded * mask).sum(1) / lengths
    for first in range(0, RESPONSES, GROUP):
        members = range(first, first + GROUP)
        for i in members:
            others = [j for j in members if j != i]
            baseline = sum(means[j] for j in others) / len(others)
            process[i] = torch.where(mask[i], (padded[i] - baseline) / scale, 0.0)
            outcome[i, lengths[i] - 1] = batch.outcomes[i] - sum(batch.outcomes[j] for j in others) / len(others)
    returns = torch.zeros_like(padded)
    carry = torch.zeros(RESPONSES)
    for t in reversed(range(longest)):
        carry = process[:, t] + outcome[:, t] + gamma * carry
        returns[:, t] = carry
    values = returns[mask]
    return (values - values.mean()) * torch.rsqrt(values.var() + 1e-8)


def ways(call):
    """The vectorised reference, torch.compile of it, and the kernels; ``call`` takes columns and a backend."""
    reference = functools.partial(call, backend="eager")
    return {"eager": reference, "compile": compiled(reference), "kernel": functools.partial(call, backend=None)}


def rloo(batch, gamma, backend):
    columns = batch.rewards, batch.outcomes, batch.cu, batch.groups
    return operations.rloo_advantages(*columns, gamma=gamma, backend=backend)


prefix = functools.partial(operations.prm_loss, kind="prefix")
RLOO = ways(rloo) | ({"loop": loop} if DEVICE == "cpu" else {})
SCAN, SUM = ways(operations.segment_scan), ways(operations.segment_sum)
STEP_REWARDS = ways(operations.step_rewards)
PPO, PRM, PREFIX = ways(operations.ppo_loss), ways(operations.prm_loss), ways(prefix)
DISTRIBUTION = ways(operations.distribution_ppo_loss)
PACK, UNPACK = ways(operations.pack), ways(operations.unpack)
# Bytes a token that must move at least once: float32 columns read and written, gradients included.
COLUMN = 4


def tokens(batch):
    return COLUMN * batch.tokens


@pytest.mark.parametrize("way", RLOO)
@pytest.mark.benchmark(group="rloo_advantages, gamma 1")
def test_rloo(benchmark, batch, way):
    timed(benchmark, without_gradients(lambda: RLOO[way](batch, 1.0)), 3 * tokens(batch))


@pytest.mark.parametrize("way", RLOO)
@pytest.mark.benchmark(group="rloo_advantages, gamma 0.95")
def test_rloo_discounted(benchmark, batch, way):
    timed(benchmark, without_gradients(lambda: RLOO[way](batch, 0.95)), 3 * tokens(batch))


@pytest.mark.parametrize("way", SCAN)
@pytest.mark.benchmark(group="segment_scan, gamma 0.95")
def test_segment_scan(benchmark, batch, way):
    timed(benchmark, without_gradients(lambda: SCAN[way](batch.rewards, batch.cu)), 2 * tokens(batch))


@pytest.mark.parametrize("way", SUM)
@pytest.mark.benchmark(group="segment_sum")
def test_segment_sum(benchmark, batch, way):
    timed(benchmark, without_gradients(lambda: SUM[way](batch.rewards, batch.cu)), tokens(batch))


@pytest.mark.parametrize("way", STEP_REWARDS)
@pytest.mark.benchmark(group="step_rewards, 20 steps a response")
def test_step_rewards(benchmark, batch, way):
    columns = (batch.rewards, batch.steps, batch.cu)
    timed(benchmark, without_gradients(lambda: STEP_REWARDS[way](*columns)), tokens(batch))


@pytest.mark.parametrize("way", PPO)
@pytest.mark.benchmark(group="ppo_loss, forward and backward")
def test_ppo_loss(benchmark, batch, way):
    logp = batch.logp.clone().requires_grad_()
    columns = (batch.old, batch.advantages)
    timed(benchmark, forward_backward(lambda: PPO[way](logp, *columns), [logp]), 4 * tokens(batch))


@pytest.mark.parametrize("way", PRM)
@pytest.mark.benchmark(group="prm_loss, forward and backward")
def test_prm_loss(benchmark, batch, way):
    ratio = batch.rewards.clone().requires_grad_()
    columns = (batch.outcomes, batch.cu, batch.groups)
    timed(benchmark, forward_backward(lambda: PRM[way](ratio, *columns), [ratio]), 2 * tokens(batch))


@pytest.mark.parametrize("way", PREFIX)
@pytest.mark.benchmark(group="prm_loss of prefixes, forward and backward")
def test_prefix_loss(benchmark, batch, way):
    ratio = batch.rewards.clone().requires_grad_()
    columns = (batch.outcomes, batch.cu, batch.groups)
    timed(benchmark, forward_backward(lambda: PREFIX[way](ratio, *columns), [ratio]), 3 * tokens(batch))


@pytest.mark.parametrize("way", DISTRIBUTION)
@pytest.mark.benchmark(group="distribution_ppo_loss, forward and backward")
def test_distribution_ppo_loss(benchmark, batch, way):
    """Of two candidates a token."""
    logp, old, advantages = (
        getattr(batch, name).unsqueeze(-1).expand(-1, 2).contiguous() for name in ("logp", "old", "advantages")
    )
    logp.requires_grad_()
    timed(benchmark, forward_backward(lambda: DISTRIBUTION[way](logp, old, advantages), [logp]), 8 * tokens(batch))


@pytest.mark.parametrize("way", PACK)
@pytest.mark.benchmark(group="pack")
def test_pack(benchmark, batch, way):
    padded = pk.unpack(batch.rewards, batch.cu)
    total = batch.tokens
    timed(benchmark, without_gradients(lambda: PACK[way](padded, batch.cu, total)), 2 * tokens(batch))


@pytest.mark.parametrize("way", UNPACK)
@pytest.mark.benchmark(group="unpack")
def test_unpack(benchmark, batch, way):
    longest = batch.longest
    moved = tokens(batch) + COLUMN * longest * batch.responses
    timed(benchmark, without_gradients(lambda: UNPACK[way](batch.rewards, batch.cu, longest)), moved)
