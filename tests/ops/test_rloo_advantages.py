"""rloo_advantages against plain loops that follow the formulas literally."""

import math

import pytest
import torch
import torch.distributed as dist
from helpers.support import assert_close, gammas, groups, offsets, seeds, split, uniform
from hypothesis import given
from hypothesis import strategies as st

import prime_kernels as pk


@pytest.fixture(autouse=True)
def on_each_backend(backend):
    """Every test here runs on the reference and on each backend with kernels; what one lacks, the next has."""
    with pk.use_backend(backend):
        yield


def loop(
    process, outcomes, lengths, sizes, *, gamma_p, gamma_o, coef_p, coef_o, normalize, baseline, whiten, carries=None
):
    """(returns, advantages) as flat lists; ``process`` and ``carries`` are one list a response, or None."""
    if process is not None:
        carries = carries or [[True] * len(row) for row in process]
        process = [
            [s if c else 0.0 for s, c in zip(row, keep, strict=True)]
            for row, keep in zip(process, carries, strict=True)
        ]
        if normalize:
            tails = [abs(math.fsum(row[t:])) for row in process for t in range(len(row))]
            scale = max(tails, default=0.0) + 1e-6
            process = [[s / scale for s in row] for row in process]
    returns, start = [], 0
    for size in sizes:
        members = range(start, start + size)
        start += size
        for i in members:
            others = [j for j in members if j != i and lengths[j] > 0]
            token_outcome = [0.0] * lengths[i]
            if lengths[i]:
                base = math.fsum(outcomes[j] for j in others) / len(others) if others else 0.0
                token_outcome[-1] = outcomes[i] - base
            token_process = [0.0] * lengths[i]
            if process is not None and any(carries[i]):
                mean = {j: math.fsum(process[j]) / sum(carries[j]) for j in members if any(carries[j])}
                n = len(mean)
                for t in range(lengths[i]):
                    if not carries[i][t]:
                        continue
                    s = process[i][t]
                    if n == 1:
                        token_process[t] = s
                    elif baseline == "reference":
                        token_process[t] = s * n / (n - 1) - math.fsum(mean.values()) / (n - 1)
                    else:
                        token_process[t] = s - math.fsum(m for j, m in mean.items() if j != i) / (n - 1)
            row, after_p, after_o = [], 0.0, 0.0
            for t in reversed(range(lengths[i])):
                after_p = token_process[t] + gamma_p * after_p
                after_o = token_outcome[t] + gamma_o * after_o
                row.append(coef_p * after_p + coef_o * after_o)
            returns += reversed(row)
    if not whiten or not returns:
        return returns, returns
    mean = math.fsum(returns) / len(returns)
    variance = math.fsum((g - mean) ** 2 for g in returns) / (len(returns) - 1) if len(returns) > 1 else 0.0
    return returns, [(g - mean) / math.sqrt(variance + 1e-8) for g in returns]


@given(
    batch=groups(),
    gamma_p=gammas,
    gamma_o=gammas,
    coef_p=st.sampled_from([0.0, 1.0, 5.0]),
    coef_o=st.sampled_from([0.0, 1.0, -2.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    normalize=st.booleans(),
    baseline=st.sampled_from(["reference", "paper"]),
    whiten=st.booleans(),
    rewards=st.sampled_from(["none", "all", "some"]),
    seed=seeds,
)
def test_matches_loop(batch, gamma_p, gamma_o, coef_p, coef_o, scale, normalize, baseline, whiten, rewards, seed):
    lengths, sizes = batch
    process = torch.tensor(uniform(sum(lengths), seed, -scale, scale), dtype=torch.float64)
    outcomes = torch.tensor(uniform(len(lengths), seed + 1, 0, 1), dtype=torch.float64)
    mask = torch.tensor(uniform(sum(lengths), seed + 2, 0, 1)) < 0.4 if rewards == "some" else None
    expected = loop(
        None if rewards == "none" else split(process.tolist(), lengths),
        outcomes.tolist(),
        lengths,
        sizes,
        gamma_p=gamma_p,
        gamma_o=gamma_o,
        coef_p=coef_p,
        coef_o=coef_o,
        normalize=normalize,
        baseline=baseline,
        whiten=whiten,
        carries=None if mask is None else split(mask.tolist(), lengths),
    )
    if mask is not None:
        process[~mask] = math.nan
    result = pk.rloo_advantages(
        None if rewards == "none" else process,
        outcomes,
        offsets(lengths, torch.int32),
        offsets(sizes),
        gamma_process=gamma_p,
        gamma_outcome=gamma_o,
        process_coef=coef_p,
        outcome_coef=coef_o,
        normalize_process=normalize,
        process_baseline=baseline,
        whiten=whiten,
        reward_mask=mask,
    )
    size = max((abs(x) for x in expected[0]), default=0.0) or 1.0
    assert_close("float64", result.returns / size, [x / size for x in expected[0]])
    # Whitening equal returns divides rounding errors by sqrt(1e-8): an absolute slack, in units of their size.
    slack = 1e-10 * max(1.0, size * 1e4 if whiten else size)
    torch.testing.assert_close(result.advantages, torch.tensor(expected[1], dtype=torch.float64), atol=slack, rtol=1e-8)


def test_group_of_one_has_baseline_zero():
    result = pk.rloo_advantages(
        torch.tensor([1.0, 3.0]), torch.tensor([0.5]), offsets([2]), offsets([1]), normalize_process=False, whiten=False
    )
    assert result.returns.tolist() == [4.5, 3.5] and torch.equal(result.returns, result.advantages)


def test_a_given_number_of_tokens_must_be_that_of_the_offsets():
    outcomes, cu, groups = torch.tensor([1.0, 0.0]), torch.tensor([0, 2, 5]), torch.tensor([0, 2])
    found = pk.rloo_advantages(None, outcomes, cu, groups)
    given = pk.rloo_advantages(None, outcomes, cu, groups, total=5)
    assert torch.equal(found.advantages, given.advantages) and found.advantages.any()
    with pytest.raises(ValueError, match="cu_seqlens: expected to end at 4 tokens, got 5"):
        pk.rloo_advantages(None, outcomes, cu, groups, total=4)
    with pytest.raises(ValueError, match="total: expected the 5 tokens of process_rewards, got 4"):
        pk.rloo_advantages(torch.zeros(5), outcomes, cu, groups, total=4)


def test_empty_response_counts_in_no_baseline():
    """The outcome 0 of the empty response must not pull the baseline of the others down."""
    with_empty = pk.rloo_advantages(None, torch.tensor([1.0, 0.0, 1.0]), offsets([1, 0, 1]), offsets([3]), whiten=False)
    assert with_empty.returns.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("lengths", [[], [0, 0], [1], [0, 1]])
def test_too_few_tokens_to_whiten(lengths):
    tokens, sizes = sum(lengths), [len(lengths)] if lengths else []
    result = pk.rloo_advantages(torch.ones(tokens), torch.ones(len(lengths)), offsets(lengths), offsets(sizes))
    assert result.advantages.tolist() == [0.0] * tokens


def test_equal_returns_give_advantage_zero():
    result = pk.rloo_advantages(None, torch.ones(4), offsets([2, 1, 3, 1]), offsets([2, 2]))
    assert result.advantages.tolist() == [0.0] * 7


def test_reference_and_paper_baselines_agree_over_a_response():
    rewards, outcomes, lengths = torch.randn(9), torch.rand(3), [4, 2, 3]

    def first_returns(kind):
        result = pk.rloo_advantages(
            rewards, outcomes, offsets(lengths), offsets([3]), process_baseline=kind, whiten=False
        )
        return result.returns[[0, 4, 6]]

    assert_close("sums", first_returns("paper"), first_returns("reference"))


def test_scale_of_process_rewards_cancels():
    rewards, outcomes, cu, groups_ = torch.randn(9), torch.rand(3), offsets([4, 2, 3]), offsets([3])
    results = [pk.rloo_advantages(scale * rewards, outcomes, cu, groups_).advantages for scale in (1.0, 50.0)]
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


def test_packing_order_does_not_show():
    lengths, sizes = [400, 3, 1, 250, 77, 12], [2, 3, 1]
    rewards, outcomes = torch.randn(sum(lengths)), torch.rand(6)
    first = pk.rloo_advantages(rewards, outcomes, offsets(lengths), offsets(sizes)).advantages
    order = [5, 3, 2, 4, 1, 0]
    rows = split(list(range(sum(lengths))), lengths)
    moved = torch.tensor([t for i in order for t in rows[i]])
    second = pk.rloo_advantages(
        rewards[moved], outcomes[order], offsets([lengths[i] for i in order]), offsets([1, 3, 2])
    ).advantages
    assert_close("packing", second, first[moved])


def test_results_are_targets():
    rewards = torch.randn(3, requires_grad=True)
    result = pk.rloo_advantages(rewards, torch.ones(1), offsets([3]), offsets([1]))
    assert not result.returns.requires_grad and not result.advantages.requires_grad
    assert result.returns.dtype == result.advantages.dtype == torch.float32


def _rank(rank: int, world: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    lengths, sizes, rewards, outcomes = _whole_batch()
    # The last rank has nothing and must still take part.
    responses, tokens = [(slice(0, 3), slice(0, 9)), (slice(3, 5), slice(9, 12)), (slice(5, 5), slice(12, 12))][rank]
    result = pk.rloo_advantages(
        rewards[tokens],
        outcomes[responses],
        offsets(lengths[responses]),
        offsets([sizes[rank]] if rank < len(sizes) else []),
        process_group=dist.group.WORLD,
    )
    queue.put((rank, result.advantages.tolist()))
    dist.destroy_process_group()


def _whole_batch():
    lengths, sizes = [4, 2, 3, 1, 2], [3, 2]
    return lengths, sizes, torch.tensor(uniform(12, 5, -1, 1)), torch.tensor(uniform(5, 6, 0, 1))


@pytest.mark.slow
def test_ranks_together_equal_one_process(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    address = f"file://{tmp_path / 'rendezvous'}"
    ranks = [context.Process(target=_rank, args=(rank, 3, address, queue)) for rank in range(3)]
    for process in ranks:
        process.start()
    results = dict(queue.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    lengths, sizes, rewards, outcomes = _whole_batch()
    whole = pk.rloo_advantages(rewards, outcomes, offsets(lengths), offsets(sizes)).advantages
    assert_close("packing", torch.tensor(results[0] + results[1] + results[2]), whole)
