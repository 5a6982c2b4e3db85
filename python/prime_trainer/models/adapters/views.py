"""Low-rank adapters (LoRA, arXiv 2106.09685) on one frozen model: which of them is on decides what a pass computes.

The adapters are peft's. Policy, PRM and reference of a run are views of the same model in memory: each forward pass
through a view first switches to its adapter, or to none. With B = 0, as an adapter starts, the pass gives the bits of
the base's.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ...config.sections import AdapterConfig, ModelConfig
from ...scale import sharding
from .. import traits
from ..model_files import ModelError
from ..protocols import CausalLM
from . import layers
from .rounding import rounded

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclass(frozen=True)
class Factors:
    """What an adapter adds to one weight: scaling * B A, transposed where the layer keeps its weight as [in, out]."""

    a: Tensor
    """[rank, in]"""
    b: Tensor
    """[out, rank]"""
    scaling: float
    transposed: bool

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """`weight` with the product added in float32, in its dtype by `rounding.rounded`, on its device."""
        # Shards are float32 masters: what is merged is what passes use, in the dtype of the base.
        a, b = (sharding.whole(x, weight.dtype, x.device).to(weight.device).float() for x in (self.a, self.b))
        product = torch.mm(b, a).mul_(self.scaling)
        exact = product.t().contiguous() if self.transposed else product
        return rounded(exact.add_(weight), weight.dtype)


def lora_config(cfg: AdapterConfig) -> LoraConfig:
    """peft's settings of a new adapter. Raises ModelError where peft is not installed."""
    peft = _peft()
    found: LoraConfig = peft.LoraConfig(
        r=cfg.rank, lora_alpha=cfg.rank * cfg.scaling, target_modules=cfg.targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return found


def _peft() -> Any:
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModelError(
            f"model.adapter needs the package {error.name}: pip install 'prime-process-rewards[adapters]'"
        ) from None
    return peft


class Base:
    """A frozen model, the adapters in it, and which of them is on."""

    def __init__(self, model: CausalLM, cfg: ModelConfig) -> None:
        """Freezes `model`, which was loaded as `cfg` says; adapters are put into it in place."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model, self.cfg = model, cfg.model_copy(update={"adapter": AdapterConfig()})
        self.configs: dict[str, LoraConfig] = {}
        self.directories: dict[str, Path] = {}
        """Of the adapters that were read from files."""
        self.head: str | None = None
        """The name of the head's weight, where there is an adapter on it."""
        self.head_rank = 0
        """Of the adapter on the head that has most, 0 without one."""
        self._layers: dict[str, Any] = {}
        self._on: str | None = None

    def add(self, name: str, config: LoraConfig, seed: int) -> AdaptedModel:
        """Puts a new adapter in, of which `seed` decides the values. Raises ModelError where that cannot be."""
        peft, kind = _peft(), type(self.model).__name__
        linear = _linear_layers(self.model)
        config = _without_all(config, linear, self.model.get_output_embeddings())
        _check_targets(config, linear, kind)
        # peft draws from the global stream.
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            with warnings.catch_warnings():  # that there is more than one adapter, which is meant
                warnings.simplefilter("ignore", UserWarning)
                peft.inject_adapter_in_model(config, self.model, name)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever peft says of a model that it does not know
            raise ModelError(
                f"model.adapter: peft cannot put an adapter into {kind}: {traits.first_line(error)}"
            ) from None
        finally:
            torch.set_rng_state(state)
        layers.round_once(self.model)
        lora = peft.tuners.lora.LoraLayer
        self._layers = {path: each for path, each in self._modules() if isinstance(each, lora)}
        mine = {path: layer for path, layer in self._layers.items() if name in layer.r}
        for path, layer in mine.items():
            _check_layer(path, layer, name, config.r, kind)
        head = self.model.get_output_embeddings()
        self.head = next((f"{path}.weight" for path, layer in self._layers.items() if layer is head), None)
        if self.head is not None:
            self.head_rank = max(head.r.values())
            # What is merged into the head is not in the embedding: a model that is written has both.
            self.model.config.tie_word_embeddings = False
        self.configs[name] = config
        self._switch(None)
        return AdaptedModel(self, name)

    def view(self, name: str | None) -> AdaptedModel:
        """The model with one adapter on, or with none."""
        return AdaptedModel(self, name)

    def switch(self, name: str | None) -> None:
        """Makes `name` the adapter that passes go through; None: no adapter."""
        if name != self._on:
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        for layer in self._layers.values():
            if name is None:
                layer.enable_adapters(False)
            else:
                if self._on is None:
                    layer.enable_adapters(True)
                layer.set_adapter(name)
            # peft takes gradients from what is off. None reach it anyway, and FSDP2 keeps two copies of the flag, of
            # which a switch meets only one.
            for factor in (layer.lora_A, layer.lora_B):
                factor.requires_grad_(True)
        self._on = name

    def _modules(self) -> Iterator[tuple[str, nn.Module]]:
        model: Any = self.model
        return iter(model.named_modules())

    def factors(self, name: str | None) -> dict[str, Factors]:
        """By the name of the weight in the base."""
        if name is None:
            return {}
        return {
            f"{path}.weight": Factors(
                layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], layer.fan_in_fan_out
            )
            for path, layer in self._layers.items()
            if name in layer.r
        }

    def own_name(self, name: str) -> str | None:
        """The name of a parameter as the base has it without adapters; None for an adapter's."""
        path, _, last = name.partition(".base_layer.")
        if path in self._layers:
            return f"{path}.{last}"
        return None if name.rpartition(".lora_")[0] in self._layers else name


class AdaptedModel:
    """A `CausalLM` that is a base with one of its adapters on, or with none.

    What is not about weights is the base's own. Its weights are those of an ordinary model, the adapter merged.
    """

    def __init__(self, base: Base, adapter: str | None) -> None:
        self.base, self.adapter = base, adapter

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of copying and pickling, before there is a base
            raise AttributeError(name)
        return getattr(self.base.model, name)

    def __call__(self, **inputs: Any) -> Any:
        self.base.switch(self.adapter)
        return self.base.model(**inputs)

    @property
    def name_or_path(self) -> str:
        """Where it was read from: the adapter, or the base for one that is new or for none."""
        return str(self.base.directories.get(self.adapter or "", self.base.cfg.path))

    @property
    def base_model(self) -> nn.Module:
        """The body; the next pass through it is this view's."""
        self.base.switch(self.adapter)
        return self.base.model.base_model

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The base's, frozen, and those of this adapter."""
        mine = {id(each) for factors in self.factors().values() for each in (factors.a, factors.b)}
        for name, parameter in self.base.model.named_parameters():
            if id(parameter) in mine or self.base.own_name(name) is not None:
                yield name, parameter

    def parameters(self) -> Iterator[nn.Parameter]:
        return (parameter for _, parameter in self.named_parameters())

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]:
        """The base's weights by the names that they have without adapters."""
        named = self.base.model.state_dict(keep_vars=keep_vars).items()
        return {own: value for name, value in named if (own := self.base.own_name(name)) is not None}

    def factors(self) -> dict[str, Factors]:
        """What the adapter adds, by the name of the weight."""
        return self.base.factors(self.adapter)

    def head_hidden(self, hidden: Tensor) -> Tensor:
        """`hidden` [.., D], and in `Base.head_rank` further columns what the adapter's A makes of them.

        With `head_weight` the head is still one product. Every view of a base has as many columns, of zeros where there
        is no adapter on the head: equal weights give the same bits.
        """
        factors = self.factors().get(self.base.head or "")
        if factors is None:
            return nn.functional.pad(hidden, (0, self.base.head_rank))
        inner = nn.functional.linear(hidden, factors.a) * factors.scaling
        return nn.functional.pad(torch.cat([hidden, inner], -1), (0, self.base.head_rank - inner.shape[-1]))

    def head_weight(self, weight: Tensor) -> Tensor:
        """The head's weight [V, D], and the adapter's B in `Base.head_rank` further columns."""
        factors = self.factors().get(self.base.head or "")
        if factors is None:
            return nn.functional.pad(weight, (0, self.base.head_rank))
        rank = factors.b.shape[-1]
        return nn.functional.pad(torch.cat([weight, factors.b], -1), (0, self.base.head_rank - rank))

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter as files have it, whole and in the dtype of the base, on the CPU; collective."""
        found = {}
        dtype = traits.dtype_of(self.base.model)
        for name, factors in self.factors().items():
            path = name.removesuffix(".weight")
            for part, value in (("lora_A", factors.a), ("lora_B", factors.b)):
                with torch.no_grad():
                    whole = sharding.whole(value, dtype, self.base.model.device)
                found[f"base_model.model.{path}.{part}.weight"] = whole.detach().cpu().contiguous()
        return found

    def merge(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The base's weights, whole, with the adapter merged into each as it comes; collective of a model in shards."""
        factors = self.factors()
        for name, weight in named:
            yield name, factors[name].merged(weight) if name in factors else weight


class MergedWeights(Mapping[str, Tensor]):
    """The weights of an `AdaptedModel` by name, each merged when it is asked for: there is no second copy of them all.

    `plain` are the base's, of the same shapes and dtypes.
    """

    def __init__(self, model: AdaptedModel, names: Iterable[str] | None = None) -> None:
        self.plain = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        if names is not None:
            self.plain = {name: self.plain[name] for name in names}
        self._model, self._factors = model, model.factors()

    def __getitem__(self, name: str) -> Tensor:
        weight = self.plain[name]
        return self._factors[name].merged(weight) if name in self._factors else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def only(self, names: Iterable[str]) -> MergedWeights:
        return MergedWeights(self._model, names)


def unmerged(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Tensors of the same names, shapes and dtypes, for who needs no more: nothing is merged for them."""
    return tensors.plain if isinstance(tensors, MergedWeights) else tensors


def as_model(view: AdaptedModel) -> CausalLM:
    """For the type checker, which does not look through `__getattr__`."""
    return cast(CausalLM, view)


def adapted(model: Any) -> AdaptedModel | None:
    """`model` where it is a view of a base with adapters."""
    return model if isinstance(model, AdaptedModel) else None


def _linear_layers(model: CausalLM) -> dict[str, nn.Module]:
    """What an adapter can go on, by path: linear layers, those with an adapter already included."""
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    whole: Any = model
    return {
        path: module
        for path, module in whole.named_modules()
        if isinstance(module, (nn.Linear, Conv1D, Linear)) and ".base_layer" not in path and ".lora_" not in path
    }


def _without_all(config: LoraConfig, linear: Mapping[str, nn.Module], head: nn.Module) -> LoraConfig:
    """`config` with the paths of all linear layers but the head for "all-linear" in a list, which peft lacks."""
    given = config.target_modules
    if given is None or isinstance(given, str) or "all-linear" not in given:
        return config
    named = {path for path, module in linear.items() if module is not head}
    found = copy.copy(config)
    found.target_modules = sorted(named | (set(given) - {"all-linear"}))
    return found


def _check_targets(config: LoraConfig, linear: Mapping[str, nn.Module], kind: str) -> None:
    """Raises ModelError for a name that matches no layer: peft is content if one of several does."""
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return
    for target in sorted(config.target_modules):
        if not any(path == target or path.endswith(f".{target}") for path in linear):
            known = sorted({path.rpartition(".")[2] for path in linear})
            raise ModelError(
                f"model.adapter.targets: {target!r} matches no linear layer of {kind}, whose layers are "
                f"{', '.join(known)}"
            )


def _check_layer(path: str, layer: Any, name: str, rank: int, kind: str) -> None:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear):
        raise ModelError(
            f"model.adapter.targets: {path} of {kind} is no linear layer but {type(layer.get_base_layer()).__name__}"
        )
    wide: Any = layer
    shape = [wide.lora_B[name].out_features, wide.lora_A[name].in_features]
    if rank > min(shape):
        raise ModelError(
            f"model.adapter.rank = {rank} is above the width of {path}, {shape}: at most {min(shape)}, or leave that "
            "layer out of model.adapter.targets"
        )
