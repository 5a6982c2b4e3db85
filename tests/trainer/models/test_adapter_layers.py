"""One linear layer with adapters: its sum is rounded once, its gradients are the formula's."""

import copy

import pytest
import torch

pytest.importorskip("peft", reason="peft is not installed: pip install '.[adapters]'")

from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from prime_trainer.config.sections import ModelConfig, ScaleConfig
from prime_trainer.models import placement
from prime_trainer.models.adapters.layers import round_once
from prime_trainer.models.forward import hidden_states

KINDS = {
    "linear": lambda: nn.Linear(24, 40, bias=False),
    "with bias": lambda: nn.Linear(24, 40),
    "transposed": lambda: Conv1D(40, 24),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, of a transposed layer and of two adapters


def adapted(layer, dtype=torch.float32, size=0.1, alpha=6):
    """`layer` with the adapters "one", on, and "other", of rank 3."""
    model = nn.Sequential(layer)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    config = LoraConfig(r=3, lora_alpha=alpha, target_modules=["0"], fan_in_fan_out=isinstance(layer, Conv1D))
    for name in ("one", "other"):
        inject_adapter_in_model(copy.copy(config), model, name)
    model.to(dtype).requires_grad_(True)
    model[0].get_base_layer().requires_grad_(False)
    model[0].set_adapter("one")
    with torch.no_grad():
        for name in ("one", "other"):
            model[0].lora_A[name].weight.normal_(0, 24**-0.5)
            model[0].lora_B[name].weight.normal_(0, size)
    return model


def weight(layer):
    """[in, out]"""
    base = layer.get_base_layer()
    return base.weight if isinstance(base, Conv1D) else base.weight.t()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [3, 6])
def test_values_and_gradients(kind, alpha):
    model = adapted(KINDS[kind](), torch.float64, alpha=alpha)
    layer, x = model[0], torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    a, b = layer.lora_A["one"].weight, layer.lora_B["one"].weight
    up = torch.randn(2, 5, 40, dtype=torch.float64)
    want = x @ weight(layer) + alpha / 3 * x @ a.t() @ b.t()
    want = want if layer.get_base_layer().bias is None else want + layer.get_base_layer().bias
    grads = torch.autograd.grad(want, (x, a, b), up)
    round_once(model)
    got = model(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, (x, a, b), up), grads)
    assert all(each.weight.grad is None for each in (layer.lora_A["other"], layer.lora_B["other"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_none_and_an_adapter_of_zeros_are_the_layer(kind, dtype):
    model = adapted(KINDS[kind](), dtype)
    layer, x = model[0], torch.randn(7, 24, dtype=dtype)
    round_once(model)
    changed = model(x)
    with torch.no_grad():
        layer.lora_B["one"].weight.zero_()
    plain = layer.get_base_layer()(x)
    zeros = model(x)
    layer.enable_adapters(False)
    assert torch.equal(model(x), zeros) and torch.equal(zeros, plain) and not torch.equal(changed, plain)
    layer.enable_adapters(True)
    layer.set_adapter("other")
    assert not torch.equal(model(x), plain)


def test_a_small_update_is_not_lost():
    """Of an update of an eighth of a unit in the last place of most outputs peft's pass loses about half."""
    once = adapted(KINDS["linear"](), torch.bfloat16, size=1e-3)
    peft = copy.deepcopy(once)
    round_once(once)
    layer, x = once[0], torch.randn(4000, 24).bfloat16()
    with torch.no_grad():
        plain = x.double() @ weight(layer).double()
        update = 2.0 * x.double() @ (layer.lora_B["one"].weight.double() @ layer.lora_A["one"].weight.double()).t()
        kept = [((model(x) - plain) * update).sum() / update.square().sum() for model in (once, peft)]
    lost = [1 - float(each) for each in kept]
    assert abs(lost[0]) < 0.05 and lost[1] > 0.4, lost


def test_what_is_no_linear_layer_stays_peft_s():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3.0 * super().forward(x)

    model = adapted(Scaled(24, 40))
    x = torch.randn(5, 24)
    want = model(x)
    round_once(model)
    assert torch.equal(model(x), want)


def test_a_copy_is_of_its_own_weights():
    model = adapted(KINDS["linear"]())
    round_once(model)
    other = copy.deepcopy(model)
    x = torch.randn(5, 24)
    before = model(x)
    with torch.no_grad():
        other[0].lora_B["one"].weight.zero_()
    assert torch.equal(model(x), before) and not torch.equal(other(x), before)


def test_selective_recomputation_makes_no_frozen_product_again(model_dir):
    """Of a gated MLP's last layer the adapter's two products are made again, in each of two layers."""
    counts = {}
    for what in ("none", "selective"):
        cfg = ModelConfig(path=str(model_dir), dtype="bfloat16", device="cpu", adapter={"rank": 4})
        base = placement.load_base(cfg)
        view = placement.put_adapter(base, "policy", cfg, 0)
        placement.recompute_activations(base.model, ScaleConfig(activation_checkpointing=what))
        found = hidden_states(view, torch.tensor([[5, 80, 33, 7]]), None, None)
        with Counted() as counted:
            found.sum().backward()
        counts[what] = counted.products
    assert counts["selective"] == counts["none"] + 2 * 2


class Counted(TorchDispatchMode):
    products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.products += func in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.addmm_.default,
        )
        return func(*args, **(kwargs or {}))
