"""The processes of a run (ranks): who this one is, what it shares out, and how they agree.

Every rank holds the token ids and outcomes of the whole step and computes advantages of all of them, which costs next
to nothing; what costs, sampling, verification and forward passes, is dealt out. Nothing global is then left to merge
but log-probs, gradients and sums, so a result does not depend on the number of ranks beyond rounding.

Rank and size come from torchrun's environment, not from torch.distributed: a rollout engine in this process may have
initialised its own process group.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..config.sections import ScaleConfig
from ..errors import RunError

Item = TypeVar("Item")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Ranks:
    """One process among `size`; `group` is None where there is no process group at all."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    saving: dist.ProcessGroup | None = None
    """A CPU group for the checkpoint thread, so that its collectives cannot interleave with those of training."""
    sampling: dist.ProcessGroup | None = None
    """Likewise for rollouts, which may run ahead in a thread."""
    mesh: DeviceMesh | None = None
    """The DeviceMesh over which models are sharded; None: every rank has a whole copy."""

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes metrics."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of `items`, dealt out in turn; `join` undoes it."""
        return list(items[self.rank :: self.size])

    def join(self, items: Sequence[Item]) -> list[Item]:
        """All ranks' parts in the order of what `share` was given."""
        parts = self.gather(list(items))
        return [parts[i % self.size][i // self.size] for i in range(sum(map(len, parts)))]

    def gather(self, value: Item) -> list[Item]:
        """What each rank holds, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replaces `tensor` by its sum over ranks."""
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_values(self, values: dict[str, float]) -> dict[str, float]:
        """Sums of floats by key; every rank has the same keys."""
        if self.group is None:
            return values
        summed = self.sum_(torch.tensor(list(values.values()), dtype=torch.float64))
        return dict(zip(values, summed.tolist(), strict=True))

    def sum_scalars(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums of scalars of one dtype and device by key, in one collective; every rank has the same keys."""
        if self.group is None:
            return values
        return dict(zip(values, self.sum_(torch.stack(list(values.values()))).unbind(), strict=True))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank."""
        return any(self.gather(flag))

    def once(self, work: Callable[[], Item]) -> Item:
        """`work()` on the first rank alone; its result, or its error, on all."""
        if self.group is None:
            return work()
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.first:
            try:
                outcome = (work(), None)
            except Exception as raised:
                outcome = (None, raised)
        result, error = self.gather(outcome)[0]
        if error is not None:
            raise error
        return result


SINGLE = Ranks()


def deal(loads: Sequence[int], size: int) -> list[list[int]]:
    """Indices of `loads` in `size` parts of nearly equal total: the largest first, each to the part with the least."""
    parts: list[list[int]] = [[] for _ in range(size)]
    heap = [(0, part) for part in range(size)]
    for index in sorted(range(len(loads)), key=lambda i: (-loads[i], i)):
        total, part = heap[0]
        parts[part].append(index)
        heapq.heapreplace(heap, (total + loads[index], part))
    return [sorted(part) for part in parts]


def restarts() -> int:
    """How often torchrun has restarted its ranks (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def _store(rank: int, size: int, timeout: timedelta) -> dist.Store:
    """The rendezvous store, with a prefix for each restart: torchrun's store keeps the addresses of dead ranks."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(
        host, port, size, is_master=rank == 0 and not kept, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
    return dist.PrefixStore(f"prime_trainer/{restarts()}", store)


@contextmanager
def connect(cfg: ScaleConfig, device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun started, or a single one where RANK and WORLD_SIZE are not set.

    Raises ValueError for an incomplete environment, RunError if the others cannot be reached.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield SINGLE
        return
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise ValueError(f"RANK and WORLD_SIZE are set but {', '.join(missing)} not: start the run with torchrun")
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    timeout = timedelta(minutes=cfg.timeout_minutes)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = _store(rank, size, timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:  # DistNetworkError among them
        raise RunError(f"rank {rank} of {size} cannot reach the others: {str(error).splitlines()[0]}") from None
    try:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("dp",)) if cfg.shard else None
        saving, sampling = (dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        yield Ranks(rank, size, dist.group.WORLD, saving, sampling, mesh)
    finally:
        dist.destroy_process_group()
