"""Passes through linear layers with adapters, each sum rounded once.

peft adds an adapter's output to that of its layer, which is in the dtype of the model by then: in bfloat16 an update
much smaller than the layer's output is lost to that rounding, in each token alike. Here the product of layer and input
is added to the adapter's output where products are accumulated, in float32, and the sum is rounded.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


class OneSum:
    """The forward pass, in place of that of peft's layer: at most one adapter is on, which is no variant of LoRA.

    With B = 0, and with no adapter on, the bits are the same: one call adds the product to the bias, or to zeros.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """[.., in] to [.., out], in the dtype of `x`, which is that of layer and adapter."""
        layer = self.get_base_layer()
        rows, bias = x.reshape(-1, x.shape[-1]), layer.bias
        matrix = layer.weight if self.fan_in_fan_out else layer.weight.t()
        name = next((each for each in self.active_adapters if each in self.lora_A), None)
        if name is None or self.disable_adapters:
            alone = x.new_zeros(1) if bias is None else bias
            other = alone.expand(len(rows), matrix.shape[1]).clone(memory_format=torch.contiguous_format)
        else:
            inner = nn.functional.linear(rows, self.lora_A[name].weight)
            if self.scaling[name] != 1.0:
                inner = inner * self.scaling[name]
            other = nn.functional.linear(inner, self.lora_B[name].weight, bias)
        # No backward pass needs what a product gave: the sum takes its place.
        return other.addmm_(rows, matrix).view(*x.shape[:-1], matrix.shape[1])


def round_once(model: Any) -> None:
    """Gives peft's linear layers in `model` the pass of `OneSum`, but for those on a layer of which the pass is another
    than a product and a bias."""
    from transformers.pytorch_utils import Conv1D

    plain, with_one_sum = _kinds()
    for layer in model.modules():
        if type(layer) is plain and type(layer.get_base_layer()).forward in (nn.Linear.forward, Conv1D.forward):
            layer.__class__ = with_one_sum


@functools.cache
def _kinds() -> tuple[Any, Any]:
    from peft.tuners.lora import Linear

    return Linear, type("LinearOfOneSum", (OneSum, Linear), {})
