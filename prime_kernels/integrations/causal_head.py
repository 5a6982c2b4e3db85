"""What lies between the base model of a causal language model and its logits.

Most models have a matrix there and nothing else. Some scale its product (Granite, Cohere, Falcon-H1, MiniCPM), some cap
it (Gemma 2), and some have more than that, which a function of the last hidden states and the matrix alone cannot give.
The configuration says which factors there may be; a probe says what the model does with them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prime_kernels.ops.linear_log_probs import whole

# Names that configurations have for a factor of the logits, and for a cap.
FACTORS = (
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "logits_mup_width_multiplier",
)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SUPPORTED = "logits = cap(scale * (weight @ hidden + bias)) of base_model's last_hidden_state, cap(z) = c * tanh(z / c)"

# Of the probe: rows and tokens, and how far beyond a cap logits go. Without one they go to UNCAPPED, where the caps
# that models have (15 to 50) show.
PROBE_SHAPE = (2, 6)
BEYOND_CAP = 3.0
UNCAPPED = 100.0
# Largest error of the probe's logits relative to the largest of them: a few roundings of the dtype.
ROUNDINGS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 8e-3, torch.bfloat16: 3e-2}
# Relative error of the factor between both: roundings average out.
SLOPE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 1e-3, torch.bfloat16: 4e-3}


class OutputLayer(NamedTuple):
    """The parameters of the output layer: weight [V, D] and bias [V] or None; of FSDP2, in shards."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class CausalHead:
    """logits = cap(scale * (weight @ hidden + bias)), with cap(z) = softcap * tanh(z / softcap), or z for None."""

    scale: float = 1.0
    softcap: float | None = None

    def of(self, product: Tensor) -> Tensor:
        """The logits that follow from ``weight @ hidden + bias`` [..., V], in its dtype."""
        product = product * self.scale if self.scale != 1.0 else product
        return product if self.softcap is None else self.softcap * torch.tanh(product / self.softcap)

    def options(self, temperature: float = 1.0) -> dict[str, Any]:
        """``temperature`` and ``softcap`` for the linear operations, which are given the output layer alone."""
        return {
            "temperature": temperature / self.scale,
            "softcap": None if self.softcap is None else self.softcap / self.scale,
        }


def output_layer(model: Any) -> OutputLayer:
    """The output layer of a causal language model.

    Raises:
        TypeError: the model has no base model or no output layer.
        ValueError: the output layer is more than a matrix and a bias, such as one with an adapter.
    """
    getter: Any = getattr(model, "get_output_embeddings", lambda: None)
    layer = getter()
    if getattr(model, "base_model", model) is model or getattr(layer, "weight", None) is None:
        raise TypeError(
            f"model: expected a Hugging Face causal language model with a backbone (base_model) and an output "
            f"layer (get_output_embeddings), got {type(model).__name__}"
        )
    parameters = {name for name, _ in layer.named_parameters()}
    if not parameters <= {"weight", "bias"} or not layer.weight.is_floating_point() or layer.weight.ndim != 2:
        others = ", ".join(sorted(parameters - {"weight", "bias"})) or f"a weight of {layer.weight.dtype}"
        raise ValueError(
            f"model: expected {type(model).__name__}'s output layer to be a matrix [V, D] and a bias, got "
            f"{type(layer).__name__} with {others}; leave adapters and quantisation off the output layer"
        )
    return OutputLayer(layer.weight, getattr(layer, "bias", None))


def candidates(config: Any) -> Iterator[CausalHead]:
    """What the configuration may mean, the likeliest first: a factor may multiply, divide (Granite) or be unused."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = next((float(value) for name in CAPS if (value := getattr(config, name, None))), None)
    name, factor = next(((name, value) for name in FACTORS if (value := getattr(config, name, None))), ("", 1.0))
    factor = float(factor)
    divides = name.startswith("logits_")
    scales = [1.0 / factor, factor, 1.0] if divides else [factor, 1.0, 1.0 / factor]
    for softcap in dict.fromkeys((cap, None)):
        for scale in dict.fromkeys(scales):
            if scale > 0:
                yield CausalHead(scale, softcap)


@torch.no_grad()
def causal_head(model: Any) -> CausalHead:
    """The head of a Hugging Face causal language model, proved on a few random tokens.

    The tokens go through ``model(...).logits``, with what the output layer gives scaled so that a cap would show, and
    through ``base_model`` and the head that is returned. Two short forward passes; in shards (FSDP2) every process
    must call it. The model must hold its data.

    Raises:
        TypeError: the model has no base model, or one without ``last_hidden_state``, or no output layer.
        ValueError: the logits are none that a CausalHead describes; the message has the class and the difference.
    """
    weight, bias = output_layer(model)
    known = list(candidates(getattr(model, "config", None)))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], PROBE_SHAPE, generator=generator).to(weight.device)
    with _evaluating(model):
        logits, factor = _scaled_logits(model, ids, known[0])
        output = model.base_model(input_ids=ids, use_cache=False)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise TypeError(f"model: expected a backbone that gives last_hidden_state, got {type(output).__name__}")
    dtype = hidden.dtype
    hidden, weight, bias = hidden.float(), whole(weight), None if bias is None else whole(bias)
    if hidden.shape[-1] != weight.shape[1] or logits.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"model: expected {type(model).__name__}'s logits from hidden states [..., {weight.shape[1]}], got logits "
            f"{list(logits.shape)} and hidden states {list(hidden.shape)}; supported: {SUPPORTED}"
        )
    product = factor * torch.nn.functional.linear(hidden, weight.float(), None if bias is None else bias.float())
    errors = [_error(head.of(product), logits) for head in known]
    for head, (largest, slope) in zip(known, errors, strict=True):
        if largest <= ROUNDINGS[dtype] and slope <= SLOPE[dtype]:
            return head
    largest = min(largest for largest, _ in errors)
    raise ValueError(
        f"model: {type(model).__name__}'s logits are not those of its last hidden states and its output layer: they "
        f"differ by {largest:.2g} of the largest; supported: {SUPPORTED}, factors from the configuration's "
        f"{', '.join(FACTORS)}, caps from {', '.join(CAPS)}"
    )


def _error(mine: Tensor, theirs: Tensor) -> tuple[float, float]:
    """(largest error, error of the common factor), both relative."""
    largest = (mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    slope = (mine * theirs).sum() / theirs.square().sum().clamp_min(1e-30) - 1
    found = (largest.item(), abs(slope.item()))
    return found if all(value == value for value in found) else (float("inf"), float("inf"))


def _scaled_logits(model: nn.Module, ids: Tensor, head: CausalHead) -> tuple[Tensor, float]:
    """(float32 logits, factor) of a pass in which the output layer's results are multiplied by the factor."""
    size = (UNCAPPED if head.softcap is None else BEYOND_CAP * head.softcap) / head.scale
    factors: list[float] = []

    def scale(_module: nn.Module, _inputs: Any, product: Tensor) -> Tensor:
        factors.append(size / max(product.abs().max().item(), 1e-30))
        return product * factors[-1]

    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    handle = layer.register_forward_hook(scale)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(factors) != 1:
        raise ValueError(
            f"model: expected {type(model).__name__}'s logits from one product of get_output_embeddings(), "
            f"got {len(factors)} in a forward pass; supported: {SUPPORTED}"
        )
    return logits.float(), factors[0]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is left as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
