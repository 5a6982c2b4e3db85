"""Two thousand random calls of log_probs and log_ratios, right and wrong ones.

Each gives right results, or an error that names the argument; none crashes, and inputs are left alone.
"""

import math
import random

import pytest
import torch
from helpers.support import assert_close, gradient_kind, seeds
from hypothesis import given, settings

import prime_kernels as pk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCABULARIES = [1, 2, 3, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]
TEMPERATURES = [1.0, 0.6, 3.0, 1, 1e-3]
EXAMPLES, CALLS = 100, 20


@settings(max_examples=EXAMPLES)
@given(seed=seeds)
def test_two_thousand_calls(backend, seed):
    source = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(CALLS):
        case = Case(source)
        if source.random() < 0.4:
            check_that_it_is_refused(case, source, backend)
        else:
            check_results(case, backend)


class Case:
    """Arguments of one call, right ones to begin with."""

    def __init__(self, source):
        self.shape = [source.randint(0, 3) for _ in range(source.randint(0, 3))]
        self.vocabulary = source.choice(VOCABULARIES)
        self.models = source.choice([1, 1, 2, 3])
        dtype = source.choice(DTYPES)
        # Models may differ in dtype.
        dtypes = [dtype if source.random() < 0.8 else source.choice(DTYPES) for _ in range(self.models)]
        spread = source.choice([0.0, 1.0, 8.0, 100.0])
        self.logits = [self.make_logits(source, each, spread) for each in dtypes]
        self.ids = torch.randint(self.vocabulary, self.shape, dtype=source.choice([torch.int32, torch.int64]))
        self.mask = torch.rand(self.shape) < 0.6 if source.random() < 0.5 else None
        if self.mask is not None:
            self.ids = self.ids.where(self.mask, source.choice([-100, 2**31 - 1, 0]))
        self.temperature = source.choice(TEMPERATURES)
        self.options = {"with_entropy": source.random() < 0.5} if self.models == 1 else {}

    def make_logits(self, source, dtype, spread):
        size = [*self.shape, self.vocabulary]
        layout = source.choice(["dense", "sliced", "stepped", "transposed"])
        if layout == "sliced":
            whole = torch.randn(*self.shape, self.vocabulary + 3)[..., 1:-2]
        elif layout == "stepped" and self.shape:
            whole = torch.randn(2 * self.shape[0], *size[1:])[::2]
        elif layout == "transposed" and self.shape:
            whole = torch.randn(*size[::-1]).permute(*range(len(size))[::-1])
        else:
            whole = torch.randn(*size)
        logits = (whole * spread).to(dtype)
        if source.random() < 0.3 and self.vocabulary > 2:
            blocked = torch.rand(logits.shape) < source.choice([0.1, 0.9])
            blocked[..., 0] = False  # every row keeps a token
            logits.masked_fill_(blocked, -math.inf)
        return logits

    def call(self, backend):
        if self.models == 1:
            return pk.log_probs(
                self.logits[0], self.ids, mask=self.mask, temperature=self.temperature, backend=backend, **self.options
            )
        policy = {"policy_logits": self.logits[2]} if self.models > 2 else {}
        return pk.log_ratios(
            *self.logits[:2], self.ids, mask=self.mask, policy_temperature=self.temperature, backend=backend, **policy
        )


def exact(logits, ids, mask, temperature):
    """(logp, entropy) in float64."""
    z = logits.double() / temperature
    log_p = z - z.logsumexp(-1, keepdim=True)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p == -torch.inf, 0.0)).sum(-1)
    if mask is not None:
        ids = ids.masked_fill(~mask, 0)
    logp = log_p.gather(-1, ids.long().unsqueeze(-1)).squeeze(-1)
    return [each if mask is None else each.masked_fill(~mask, 0.0) for each in (logp, entropy)]


def check_results(case, backend):
    case.logits = [logits.requires_grad_() for logits in case.logits]
    before = [logits.detach().clone() for logits in case.logits]
    found = case.call(backend)
    temperatures = [case.temperature] if case.models == 1 else [1.0, 1.0, case.temperature]
    if case.models == 1:
        outputs = list(found) if case.options["with_entropy"] else [found]
        pairs = [(logits, outputs, temperature) for logits, temperature in zip(case.logits, temperatures, strict=True)]
    else:
        by_model = [[found.prm_logp], [found.ref_logp], [found.policy_logp]][: case.models]
        pairs = list(zip(case.logits, by_model, temperatures, strict=False))
        both_finite = found.prm_logp.isfinite() & found.ref_logp.isfinite()
        assert torch.equal(
            found.log_ratio.masked_fill(~both_finite, 0.0),
            (found.prm_logp - found.ref_logp).masked_fill(~both_finite, 0),
        )
    for place, (logits, outputs, temperature) in enumerate(pairs):
        assert torch.equal(logits.detach(), before[place])
        leaf = before[place].double().requires_grad_()
        truth = exact(leaf, case.ids, case.mask, temperature)[: len(outputs)]
        # Float32 keeps 2^-24 of the largest logit.
        largest = before[place].double().masked_fill(before[place] == -math.inf, 0.0).abs()
        extent = largest.max().item() / temperature if largest.numel() else 0.0
        for got, want in zip(outputs, truth, strict=True):
            assert got.dtype == torch.float32 and got.shape == torch.Size(case.shape)
            assert_close("logp", got, want.detach(), extent=extent)
        if place == 1 and case.models > 1:
            assert not outputs[0].requires_grad
            continue
        upstream = [torch.randn(case.shape) for _ in outputs]
        # A target of probability 0 has an infinite log-probability and no derivative to compare.
        upstream = [each.where(want.detach().isfinite(), 0.0) for each, want in zip(upstream, truth, strict=True)]
        (got,) = torch.autograd.grad(outputs, logits, upstream, retain_graph=True)
        (want,) = torch.autograd.grad(truth, leaf, [each.double() for each in upstream])
        assert got.dtype == logits.dtype
        scale = max(1.0, max((each.abs().max().item() for each in upstream if each.numel()), default=1.0)) / temperature
        # Beside a probability of float32 accuracy: what its exponent, z / temperature, is rounded by.
        assert_close(gradient_kind(logits.dtype), got, want, extent=(8.0 + 4.0 * extent) * scale)


def check_that_it_is_refused(case, source, backend):
    name, error, what = source.choice(FAULTS)(case, source)
    with pytest.raises(error) as caught:
        case.call(what.get("backend", backend) if what else backend)
    assert str(caught.value).startswith(name), f"expected an error about {name}, got {caught.value}"


def first(case):
    return "logits" if case.models == 1 else "prm_logits"


def temperature_name(case):
    return "temperature" if case.models == 1 else "policy_temperature"


def ids_of_float(case, source):
    case.ids = case.ids.float()
    return "ids", TypeError, None


def ids_of_another_shape(case, source):
    # One dimension more would be several ids of each position.
    case.ids = torch.zeros([*case.shape, 2, 1], dtype=torch.int64)
    return "ids", ValueError, None


def ids_out_of_range(case, source):
    case.shape, case.mask = [3], None
    case.logits = [torch.randn(3, case.vocabulary) for _ in case.logits]
    case.ids = torch.zeros(3, dtype=torch.int64)
    case.ids[source.randrange(3)] = source.choice([-1, case.vocabulary, 2**40, -(2**62)])
    return "ids", IndexError, None


def mask_of_numbers(case, source):
    case.mask = torch.ones(case.shape)
    return "mask", TypeError, None


def mask_of_another_shape(case, source):
    case.mask = torch.ones([*case.shape, 1], dtype=torch.bool)
    return "mask", ValueError, None


def bad_temperature(case, source):
    case.temperature = source.choice([0.0, -1.0, math.nan, math.inf])
    return temperature_name(case), ValueError, None


def temperature_of_another_type(case, source):
    case.temperature = source.choice(["1", None, True])
    return temperature_name(case), TypeError, None


def whole_numbers_for_logits(case, source):
    case.logits[0] = case.logits[0].nan_to_num().int()
    return first(case), TypeError, None


def no_tensor(case, source):
    case.logits[0] = [1.0]
    return first(case), TypeError, None


def no_vocabulary(case, source):
    case.logits[0] = torch.zeros([*case.shape, 0])
    return first(case), ValueError, None


def another_vocabulary(case, source):
    if case.models == 1:
        return no_vocabulary(case, source)
    case.logits[1] = torch.zeros([*case.shape, case.vocabulary + 1])
    return "ref_logits", ValueError, None


def unknown_backend(case, source):
    return "backend", ValueError, {"backend": "fast"}


def another_device(case, source):
    case.ids = case.ids.to("meta")
    return "ids", ValueError, None


FAULTS = [
    ids_of_float,
    ids_of_another_shape,
    ids_out_of_range,
    mask_of_numbers,
    mask_of_another_shape,
    bad_temperature,
    temperature_of_another_type,
    whole_numbers_for_logits,
    no_tensor,
    no_vocabulary,
    another_vocabulary,
    unknown_backend,
    another_device,
]
if torch.get_default_device().type == "cuda":
    # On a GPU this is a device-side assert, which ends the process.
    FAULTS.remove(ids_out_of_range)
