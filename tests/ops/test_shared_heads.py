"""A head whose vocabulary is shared by processes, or kept in shards by FSDP2: the results of a whole one."""

import pytest
import torch
import torch.distributed as dist
from helpers.spawn import spawn

import prime_kernels as pk

TOKENS, WIDTH, VOCABULARY = 10, 6, 24


def inputs(dtype=torch.float32):
    torch.manual_seed(7)
    hidden, weight, bias = torch.randn(TOKENS, WIDTH), torch.randn(VOCABULARY, WIDTH), torch.randn(VOCABULARY)
    bias[-3:] = -torch.inf  # padding
    mask = torch.arange(TOKENS) % 5 != 2
    ids = torch.randint(VOCABULARY - 3, (TOKENS,)).where(mask, -1)
    return [x.to(dtype) for x in (hidden, weight, bias)], ids, mask, (torch.randn(TOKENS), torch.randn(TOKENS))


def results(hidden, weight, bias, ids, mask, upstream, **options):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    outputs = pk.linear_log_probs(
        leaves[0], leaves[1], ids, bias=leaves[2], mask=mask, temperature=0.8, with_entropy=True, **options
    )
    return [x.detach() for x in outputs], torch.autograd.grad(outputs, leaves, upstream)


def close(got, want, dtype):
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(got, want, rtol=rounding, atol=rounding * max(1.0, want.abs().nan_to_num().max().item()))


def share(rank, size, store, cases):
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))
    try:
        torch.set_num_threads(1)
        for dtype, backend in cases:
            compare(rank, size, dtype, backend)
        with pytest.raises(IndexError, match=r"ids: expected labels in \[0, 24\), got 24"):
            (hidden, weight, _), *_ = inputs()
            mine = slice(rank * VOCABULARY // size, (rank + 1) * VOCABULARY // size)
            pk.linear_log_probs(hidden, weight[mine], torch.full((TOKENS,), 24), process_group=dist.group.WORLD)
        # Nobody leaves while another may still be talking to it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def compare(rank, size, dtype, backend):
    (hidden, weight, bias), ids, mask, upstream = inputs(dtype)
    want, gradients = results(hidden, weight, bias, ids, mask, upstream, backend=backend)
    mine = slice(rank * VOCABULARY // size, (rank + 1) * VOCABULARY // size)
    group = {"process_group": dist.group.WORLD, "backend": backend}
    got, found = results(hidden, weight[mine], bias[mine], ids, mask, upstream, **group)
    for a, b in zip(got, want, strict=True):
        close(a, b, dtype)
    close(found[0], gradients[0], dtype)
    close(found[1], gradients[1][mine], dtype)
    close(found[2], gradients[2][mine], dtype)


def sharded(rank, size, store, dtype, backend):
    """FSDP2 keeps a parameter as a DTensor: it is gathered, and its gradient goes back in shards."""
    dist.init_process_group("gloo", rank=rank, world_size=size, store=dist.FileStore(store, size))
    try:
        from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

        (hidden, weight, _), ids, mask, upstream = inputs(dtype)
        mesh = init_device_mesh("cpu", (size,))
        leaf, whole = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_(), weight.clone().requires_grad_()
        got, want = (
            pk.linear_log_probs(hidden, parameter, ids, mask=mask, backend=backend) for parameter in (leaf, whole)
        )
        torch.testing.assert_close(got, want)
        got.backward(upstream[0] * (1 + rank))
        want.backward(upstream[0])
        # Every process saw the same tokens up to a factor: the mean over processes, in shards again.
        assert leaf.grad.placements == leaf.placements
        torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad * (1 + size) / 2)
        nll = pk.linear_nll(hidden, leaf, ids, mask=mask, backend=backend)
        torch.testing.assert_close(nll, pk.linear_nll(hidden, weight, ids, mask=mask, backend=backend))
        # Nobody leaves while another may still be talking to it.
        dist.barrier()
    finally:
        dist.destroy_process_group()


# (dtype, backend), the last one without the extension.
CASES = [(torch.float32, None), (torch.bfloat16, None), (torch.float32, "eager")]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shared_vocabulary(size):
    """The start of a process takes longer than all that it tests: several cases one after the other."""
    spawn(share, size, CASES)


def test_sharded_parameter():
    spawn(sharded, 2, torch.float32, None)
