"""Models in shards over the ranks (FSDP2): float32 masters, gathered layer by layer in the compute dtype.

The body (embedding and layers) is FSDP2's own. The output layer is kept beside it as one DTensor, shared with the
embedding where the model ties them, because the losses take its weight and not its output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor


class Shardable(Protocol):
    """What sharding uses of a causal LM of transformers."""

    compute_dtype: torch.dtype
    """Set by `shard`."""
    head_group: dist.ProcessGroup | None
    """Set by `shard`: the ranks that share out the head's rows, None where each gathers all of them."""
    _no_split_modules: Any

    @property
    def base_model(self) -> nn.Module: ...

    def get_input_embeddings(self) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]: ...


Model = TypeVar("Model", bound=Shardable)


def shard(model: Model, mesh: DeviceMesh, *, offload: bool, split_head: bool = False) -> Model:
    """Shards a causal LM over `mesh` in place. Shards of parameters that take gradients are float32 masters, others are
    in the compute dtype.

    `offload`: shards live in CPU memory and pass through the device layer by layer, optimizer steps run on the CPU.
    `split_head`: the output layer is never gathered; the ranks share out its rows, of which each must have as many.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    compute = next(model.parameters()).dtype
    mixed = compute != torch.float32 and any(param.requires_grad for param in model.parameters())
    precision = MixedPrecisionPolicy(param_dtype=compute if mixed else None, reduce_dtype=torch.float32)

    def stored(param: nn.Parameter) -> torch.dtype:
        return torch.float32 if param.requires_grad else compute

    where = CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if offload else OffloadPolicy()
    body, head = model.base_model, model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    tied = head.weight is embedding.weight
    if split_head and len(head.weight) % mesh.size():
        raise ValueError(
            f"scale.vocab_parallel_head = true: the head's {len(head.weight)} rows must divide by the number of ranks, "
            f"got {mesh.size()}"
        )
    # One module at a time, so that no float32 copy of the whole model exists.
    for module in [*layers(model), body]:
        for param in module.parameters():
            if not isinstance(param, DTensor):
                param.data = param.data.to(stored(param))
        # Resharded after each use, the root too: an optimizer step must not leave old weights gathered.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=where)
        # Losses divide by global counts: gradients are sums.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    for name, param in list(head.named_parameters(recurse=False)):
        if name == "weight" and tied:
            head.weight = embedding.weight
            continue
        split: Tensor = distribute_tensor(param.data.to(mesh.device_type, stored(param)), mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(split.to("cpu") if offload else split, requires_grad=param.requires_grad))
    model.compute_dtype, model.head_group = compute, mesh.get_group() if split_head else None
    # The first pass through the body makes it FSDP2's root, which must happen before gathering by hand.
    with torch.no_grad():
        token = torch.zeros((1, 1), dtype=torch.int64, device=mesh.device_type)
        body(input_ids=token, position_ids=token, use_cache=False)
    return model


def layers(model: Shardable) -> list[nn.Module]:
    """The decoder layers: the modules that the model declares indivisible (`_no_split_modules`)."""
    names = set(model._no_split_modules or ())
    found = [module for module in model.base_model.modules() if type(module).__name__ in names]
    if not found:
        raise ValueError(f"{type(model).__name__} does not name its layers (_no_split_modules): it cannot be sharded")
    return found


class _Whole(torch.autograd.Function):
    """All-gather in the dtype of the computation; the gradients' sum over ranks goes back in float32 shards."""

    @staticmethod
    def forward(ctx: Any, shards: DTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype, ctx.device = (
            shards.device_mesh, shards.placements, shards.dtype, shards.to_local().device,
        )  # fmt: skip
        local = shards.to_local().to(device, dtype)
        whole = DTensor.from_local(local, ctx.mesh, ctx.placements, shape=shards.shape, stride=shards.stride())
        return whole.full_tensor()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        summed = DTensor.from_local(grad.to(ctx.dtype).contiguous(), ctx.mesh, [Partial("sum")])
        return summed.redistribute(ctx.mesh, ctx.placements).to(ctx.device), None, None


def whole(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A parameter as one tensor on every rank, differentiable; one that is not in shards comes back as it is."""
    return _Whole.apply(parameter, dtype, device) if isinstance(parameter, DTensor) else parameter


class _Share(torch.autograd.Function):
    """This rank's rows in the dtype of the computation; their gradient is complete and goes back in float32."""

    @staticmethod
    def forward(ctx: Any, shards: DTensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        local = shards.to_local()
        ctx.mesh, ctx.placements, ctx.dtype, ctx.device = (
            shards.device_mesh, shards.placements, shards.dtype, local.device,
        )  # fmt: skip
        return local.to(device, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return DTensor.from_local(grad.to(ctx.device, ctx.dtype), ctx.mesh, ctx.placements), None, None


def share(parameter: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """This rank's rows of a parameter in equal shares, differentiable: for losses that see all ranks' tokens."""
    return _Share.apply(parameter, dtype, device)


@contextmanager
def gathered(model: Shardable) -> Iterator[None]:
    """The whole model on every rank, in the compute dtype, for passes that other ranks do not take part in."""
    from torch.distributed.fsdp import FSDPModule

    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not modules:
        yield
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    shards = dict(head.named_parameters(recurse=False))
    tied = shards["weight"] is embedding.weight
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    device = embedding.weight.device
    try:
        with torch.no_grad():
            for name, param in shards.items():
                one = embedding.weight if name == "weight" and tied else whole(param, model.compute_dtype, device)
                setattr(head, name, nn.Parameter(one.detach(), requires_grad=param.requires_grad))
        yield
    finally:
        for name, param in shards.items():
            setattr(head, name, param)
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


@torch.no_grad()
def whole_tensors(model: Shardable, device: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """The state dict one whole tensor after the other, in the compute dtype; every rank must go through all of them.

    `device`: where gathered tensors go; None leaves them on the device that gathered them.
    """
    state = model.state_dict(keep_vars=True)
    uses = Counter(map(id, state.values()))
    tied: dict[int, Tensor] = {}
    for name, value in state.items():
        if not isinstance(value, DTensor):
            yield name, value.detach()
            continue
        tensor = tied.get(id(value))
        if tensor is None:
            tensor = whole(value, model.compute_dtype, torch.device(value.device_mesh.device_type)).to(device)
        if uses[id(value)] > 1:
            tied[id(value)] = tensor
        yield name, tensor
