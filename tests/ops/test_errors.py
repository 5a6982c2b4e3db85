"""One clear error for each kind of bad input, the same on every backend: argument, what was expected, what came."""

import re

import pytest
import torch
from helpers.support import offsets

import prime_kernels as pk

NAN, INF = float("nan"), float("inf")


def tensors() -> dict[str, torch.Tensor]:
    """Valid arguments of every operation: five tokens, three responses, two groups."""
    torch.manual_seed(0)
    return {
        "logits": torch.randn(5, 7),
        "ids": torch.tensor([0, 1, 2, 6, 3]),
        "mask": torch.tensor([True, True, False, True, True]),
        "hidden": torch.randn(5, 4),
        "weight": torch.randn(7, 4),
        "values": torch.randn(5),
        "cu": offsets([2, 0, 3]),
        "groups": offsets([2, 1]),
        "outcomes": torch.tensor([1.0, 0.0, 1.0]),
    }


def log_probs(backend=None, **changed):
    a = tensors() | changed
    options = {k: a[k] for k in ("temperature", "inplace_backward", "with_entropy") if k in a}
    return pk.log_probs(a["logits"], a["ids"], mask=a["mask"], backend=backend, **options)


def log_ratios(backend=None, **changed):
    a = tensors()
    a = {"ref": a["logits"], "policy": a["logits"], "policy_temperature": 1.0} | a | changed
    return pk.log_ratios(
        a["logits"],
        a["ref"],
        a["ids"],
        policy_logits=a["policy"],
        mask=a["mask"],
        policy_temperature=a["policy_temperature"],
        backend=backend,
    )


def linear_log_probs(backend=None, **changed):
    a = {"bias": None, "temperature": 1.0} | tensors() | changed
    return pk.linear_log_probs(
        a["hidden"],
        a["weight"],
        a["ids"],
        bias=a["bias"],
        mask=a["mask"],
        temperature=a["temperature"],
        backend=backend,
    )


def linear_log_ratios(backend=None, **changed):
    a = tensors()
    head = pk.Head(a["hidden"], a["weight"])
    a = {"prm": head, "ref": head, "policy": head} | a | changed
    return pk.linear_log_ratios(a["prm"], a["ref"], a["ids"], policy=a["policy"], mask=a["mask"], backend=backend)


def linear_nll(backend=None, **changed):
    a = tensors() | changed
    options = {k: a[k] for k in ("weights", "denominator", "temperature", "bias") if k in a}
    return pk.linear_nll(a["hidden"], a["weight"], a["ids"], mask=a["mask"], backend=backend, **options)


def linear_ppo_loss(backend=None, **changed):
    a = tensors()
    a = {"old": a["values"], "advantages": a["values"]} | a | changed
    options = {k: a[k] for k in ("weights", "denominator", "clip_low", "dual_clip") if k in a}
    columns = (a["old"], a["advantages"])
    return pk.linear_ppo_loss(a["hidden"], a["weight"], a["ids"], *columns, mask=a["mask"], backend=backend, **options)


def segment_scan(backend=None, **changed):
    a = {"gamma": 0.5, "reverse": False} | tensors() | changed
    return pk.segment_scan(a["values"], a["cu"], gamma=a["gamma"], reverse=a["reverse"], backend=backend)


def segment_sum(backend=None, **changed):
    a = tensors() | changed
    return pk.segment_sum(a["values"], a["cu"], backend=backend)


def step_rewards(backend=None, **changed):
    a = {"steps": offsets([1, 1, 3]), "mode": "single"} | tensors() | changed
    return pk.step_rewards(a["values"], a["steps"], a["cu"], mode=a["mode"], backend=backend)


def rloo_advantages(backend=None, **changed):
    a = tensors() | changed
    options = {k: v for k, v in changed.items() if k not in ("values", "outcomes", "cu", "groups")}
    return pk.rloo_advantages(a["values"], a["outcomes"], a["cu"], a["groups"], backend=backend, **options)


def pack(backend=None, **changed):
    a = {"padded": torch.zeros(3, 4)} | tensors() | changed
    options = {k: v for k, v in changed.items() if k in ("total", "padding")}
    return pk.pack(a["padded"], a["cu"], backend=backend, **options)


def unpack(backend=None, **changed):
    a = tensors() | changed
    options = {k: v for k, v in changed.items() if k in ("length", "padding", "fill")}
    return pk.unpack(a["values"], a["cu"], backend=backend, **options)


def ppo_loss(backend=None, **changed):
    a = tensors()
    a = {"old": a["values"], "advantages": a["values"]} | a | changed
    options = {k: v for k, v in changed.items() if k not in ("values", "old", "advantages", "mask")}
    return pk.ppo_loss(a["values"], a["old"], a["advantages"], mask=a["mask"], backend=backend, **options)


def candidates(backend=None, **changed):
    a = {"min_prob": 0.2} | tensors() | changed
    return pk.candidates(a["logits"], a["ids"], min_prob=a["min_prob"], mask=a["mask"], backend=backend)


def distribution_ppo_loss(backend=None, **changed):
    a = tensors()
    a = {"old": a["logits"], "advantages": a["logits"]} | a | changed
    return pk.distribution_ppo_loss(a["logits"], a["old"], a["advantages"], mask=a["mask"], backend=backend)


def prm_loss(backend=None, **changed):
    a = tensors() | changed
    options = {k: v for k, v in changed.items() if k in ("kind", "beta", "margin", "weights", "shift")}
    return pk.prm_loss(a["values"], a["outcomes"], a["cu"], cu_groups=a["groups"], backend=backend, **options)


def t(*values, dtype=None):
    return torch.tensor(values, dtype=dtype)


META = {"device": "meta"}
CASES = [
    (log_probs, {"logits": [1.0]}, TypeError, "logits: expected a tensor of float32", "got list"),
    (log_probs, {"logits": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "logits: expected dtype float32", "int64"),
    (log_probs, {"logits": torch.zeros(5, 0)}, ValueError, "logits: expected shape [..., V]", "[5, 0]"),
    (log_probs, {"ids": torch.zeros(5)}, TypeError, "ids: expected dtype int32 or int64", "float32"),
    (log_probs, {"ids": t(1, 2)}, ValueError, "ids: expected shape [5]", "[2]"),
    (log_probs, {"ids": torch.zeros(5, dtype=torch.int64, **META)}, ValueError, "ids: expected device cpu", "meta"),
    (log_probs, {"ids": t(0, 7, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 7 at [1]"),
    (log_probs, {"ids": t(0, 0, 0, -1, 0)}, IndexError, "ids: expected labels in [0, 7)", "got -1 at [3]"),
    (log_probs, {"mask": torch.ones(5)}, TypeError, "mask: expected dtype bool", "float32"),
    (log_probs, {"mask": t(True)}, ValueError, "mask: expected shape [5]", "[1]"),
    (log_probs, {"temperature": 0.0}, ValueError, "temperature: expected a finite number in (0, inf)", "got 0.0"),
    (log_probs, {"temperature": NAN}, ValueError, "temperature: expected a finite number", "got nan"),
    (log_probs, {"temperature": "1"}, TypeError, "temperature: expected a number", "got str"),
    (log_probs, {"with_entropy": 1}, TypeError, "with_entropy: expected True or False", "got int"),
    (
        log_probs,
        {"logits": torch.randn(7, 5).T, "inplace_backward": True},
        ValueError,
        "inplace_backward: expected logits with a last stride of 1",
        "got strides [1, 5]",
    ),
    (
        log_ratios,
        {"ref": torch.zeros(5, 8)},
        ValueError,
        "ref_logits: expected shape [5, 7] as of prm_logits",
        "[5, 8]",
    ),
    (log_ratios, {"ref": None}, TypeError, "ref_logits: expected a tensor", "NoneType"),
    (log_ratios, {"policy": torch.zeros(4, 7)}, ValueError, "policy_logits: expected shape [5, 7]", "[4, 7]"),
    (log_ratios, {"policy_temperature": -1}, ValueError, "policy_temperature: expected a finite number", "got -1"),
    (log_ratios, {"ids": t(0, 9, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 9 at [1]"),
    (linear_log_probs, {"hidden": torch.zeros(())}, ValueError, "hidden: expected shape [..., D]", "got []"),
    (linear_log_probs, {"weight": torch.zeros(7, 3)}, ValueError, "weight: expected shape [7, 4]", "[7, 3]"),
    (linear_log_probs, {"weight": torch.zeros(0, 4)}, ValueError, "weight: expected shape [V, D]", "[0, 4]"),
    (linear_log_probs, {"weight": torch.zeros(7, 4).half()}, TypeError, "weight: expected dtype float32", "float16"),
    (linear_log_probs, {"bias": torch.zeros(6)}, ValueError, "bias: expected shape [7]", "[6]"),
    (linear_log_probs, {"ids": t(0, 7, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 7 at [1]"),
    (linear_log_probs, {"temperature": 0}, ValueError, "temperature: expected a finite number", "got 0"),
    (linear_log_ratios, {"ref": torch.zeros(5, 7)}, TypeError, "ref: expected a Head", "got Tensor"),
    (
        linear_log_ratios,
        {"policy": pk.Head(torch.zeros(5, 4), torch.zeros(7, 3))},
        ValueError,
        "policy.weight: expected shape [7, 4]",
        "[7, 3]",
    ),
    (linear_log_ratios, {"ids": t(0, 7, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 7 at [1]"),
    (linear_nll, {"weight": torch.zeros(7, 3)}, ValueError, "weight: expected shape [7, 4]", "[7, 3]"),
    (linear_nll, {"ids": t(0, 7, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 7 at [1]"),
    (linear_nll, {"weights": torch.zeros(4)}, ValueError, "weights: expected shape [5] as of ids", "[4]"),
    (linear_nll, {"weights": t(1, 1, 1, 1, 1)}, TypeError, "weights: expected dtype float32", "int64"),
    (linear_nll, {"denominator": 0}, ValueError, "denominator: expected a finite number in (0, inf)", "got 0"),
    (linear_nll, {"temperature": -1.0}, ValueError, "temperature: expected a finite number", "got -1.0"),
    (linear_ppo_loss, {"old": torch.zeros(4)}, ValueError, "old_logp: expected shape [5] as of ids", "[4]"),
    (linear_ppo_loss, {"advantages": None}, TypeError, "advantages: expected a tensor", "NoneType"),
    (linear_ppo_loss, {"dual_clip": 0.5}, ValueError, "dual_clip: expected a finite number in (1, inf)", "got 0.5"),
    (linear_ppo_loss, {"clip_low": 1.1}, ValueError, "clip_low: expected a finite number in [0, 1]", "got 1.1"),
    (linear_ppo_loss, {"denominator": t(1.0, 2.0)}, ValueError, "denominator: expected one element", "[2]"),
    (segment_scan, {"values": torch.zeros(5, 1)}, ValueError, "values: expected 1 dimension", "[5, 1]"),
    (segment_scan, {"cu": t(0.0, 5.0)}, TypeError, "cu_seqlens: expected dtype int32 or int64", "float32"),
    (segment_scan, {"cu": t(1, 5)}, ValueError, "cu_seqlens: expected to start at 0", "got 1"),
    (segment_scan, {"cu": t(0, 4)}, ValueError, "cu_seqlens: expected to end at 5 tokens", "got 4"),
    (segment_scan, {"cu": t(0, 3, 2, 5)}, ValueError, "cu_seqlens: expected non-decreasing", "got 3 then 2 at 2"),
    (segment_scan, {"cu": t(dtype=torch.int64)}, ValueError, "cu_seqlens: expected at least one offset", "[0]"),
    (segment_scan, {"gamma": 1.5}, ValueError, "gamma: expected a finite number in [0, 1]", "got 1.5"),
    (segment_scan, {"reverse": None}, TypeError, "reverse: expected True or False", "NoneType"),
    (segment_sum, {"values": t(1, 2, 3, 4, 5)}, TypeError, "values: expected dtype float32", "int64"),
    (segment_sum, {"cu": t(0, 6)}, ValueError, "cu_segments: expected to end at 5 tokens", "got 6"),
    (step_rewards, {"steps": t(0, 3, 5)}, ValueError, "cu_steps: expected every offset of cu_seqlens", "none at 2"),
    (step_rewards, {"mode": "sum"}, ValueError, "mode: expected one of 'single', 'cumulative'", "got 'sum'"),
    (step_rewards, {"cu": t(0, 4)}, ValueError, "cu_seqlens: expected to end at 5 tokens", "got 4"),
    (pack, {"padded": [1.0]}, TypeError, "padded: expected a tensor", "got list"),
    (pack, {"padded": torch.zeros(3, 4, dtype=torch.complex128)}, TypeError, "padded: expected a dtype", "complex128"),
    (pack, {"padded": torch.zeros(3)}, ValueError, "padded: expected at least 2 dimensions", "[3]"),
    (pack, {"padded": torch.zeros(2, 4)}, ValueError, "padded: expected shape [3, 4] as of the rows", "[2, 4]"),
    (pack, {"padded": torch.zeros(3, 2)}, ValueError, "cu_seqlens: expected segments of at most 2", "got 3"),
    (pack, {"total": 4}, ValueError, "cu_seqlens: expected to end at 4 tokens", "got 5"),
    (pack, {"total": 5.0}, TypeError, "total: expected a whole number or None", "got float"),
    (pack, {"padding": "both"}, ValueError, "padding: expected one of 'right', 'left'", "got 'both'"),
    (unpack, {"values": torch.zeros(())}, ValueError, "values: expected at least 1 dimensions", "[]"),
    (unpack, {"cu": t(0, 4)}, ValueError, "cu_seqlens: expected to end at 5 tokens", "got 4"),
    (unpack, {"length": 2}, ValueError, "cu_seqlens: expected segments of at most 2 (length)", "got 3"),
    (unpack, {"length": -1}, ValueError, "length: expected at least 0", "got -1"),
    (unpack, {"fill": "0"}, TypeError, "fill: expected a number", "got str"),
    (unpack, {"values": t(1, 2, 3, 4, 5), "fill": 0.5}, ValueError, "fill: expected a whole number", "got 0.5"),
    (unpack, {"values": t(1, 2, 3, 4, 5), "fill": 2**70}, ValueError, "fill: expected a value of", "got 11805916207"),
    (rloo_advantages, {"outcomes": t(1.0, NAN, 0.0)}, ValueError, "outcomes: expected finite values", "got nan at [1]"),
    (rloo_advantages, {"outcomes": t(1.0, 0.0)}, ValueError, "outcomes: expected shape [3]", "[2]"),
    (rloo_advantages, {"outcomes": t(1, 0, 1)}, TypeError, "outcomes: expected dtype float32", "int64"),
    (rloo_advantages, {"groups": t(0, 2)}, ValueError, "cu_groups: expected to end at 3 responses", "got 2"),
    (rloo_advantages, {"values": t(1, 1, NAN, 1, 1)}, ValueError, "process_rewards: expected finite", "got nan at [2]"),
    (rloo_advantages, {"values": torch.zeros(4)}, ValueError, "cu_seqlens: expected to end at 4 tokens", "got 5"),
    (rloo_advantages, {"reward_mask": t(True)}, ValueError, "reward_mask: expected shape [5]", "[1]"),
    (rloo_advantages, {"values": None, "reward_mask": t(True)}, ValueError, "reward_mask: expected None", "got a mask"),
    (rloo_advantages, {"gamma_process": -0.1}, ValueError, "gamma_process: expected a finite number", "got -0.1"),
    (rloo_advantages, {"process_coef": NAN}, ValueError, "process_coef: expected a finite number", "got nan"),
    (rloo_advantages, {"process_baseline": "x"}, ValueError, "process_baseline: expected one of 'reference'", "'x'"),
    (rloo_advantages, {"whiten": "yes"}, TypeError, "whiten: expected True or False", "got str"),
    (ppo_loss, {"old": torch.zeros(4)}, ValueError, "old_logp: expected shape [5] as of logp", "[4]"),
    (ppo_loss, {"advantages": None}, TypeError, "advantages: expected a tensor", "NoneType"),
    (ppo_loss, {"weights": torch.zeros(5, **META)}, ValueError, "weights: expected device cpu", "meta"),
    (ppo_loss, {"mask": t(1, 1, 1, 1, 1)}, TypeError, "mask: expected dtype bool", "int64"),
    (ppo_loss, {"clip_low": 1.1}, ValueError, "clip_low: expected a finite number in [0, 1]", "got 1.1"),
    (ppo_loss, {"clip_high": -1}, ValueError, "clip_high: expected a finite number in [0, inf)", "got -1"),
    (ppo_loss, {"dual_clip": 1}, ValueError, "dual_clip: expected a finite number in (1, inf)", "got 1"),
    (ppo_loss, {"denominator": 0}, ValueError, "denominator: expected a finite number in (0, inf)", "got 0"),
    (ppo_loss, {"denominator": t(0.0)}, ValueError, "denominator: expected finite values above 0", "got 0.0"),
    (ppo_loss, {"denominator": t(1.0, 2.0)}, ValueError, "denominator: expected one element", "[2]"),
    (candidates, {"min_prob": 0.0}, ValueError, "min_prob: expected a finite number in [0.001, 1]", "got 0.0"),
    (candidates, {"ids": t(0, 7, 0, 0, 0)}, IndexError, "ids: expected labels in [0, 7)", "got 7 at [1]"),
    (distribution_ppo_loss, {"old": torch.zeros(5)}, ValueError, "old_logp: expected shape [5, 7] as of logp", "[5]"),
    (distribution_ppo_loss, {"mask": t(True)}, ValueError, "mask: expected shape [5] as of the leading", "[1]"),
    (prm_loss, {"outcomes": t(1.0, 0.0, 1.5)}, ValueError, "outcomes: expected values in [0, 1]", "got 1.5 at [2]"),
    (prm_loss, {"outcomes": t(NAN, 0.0, 1.0)}, ValueError, "outcomes: expected values in [0, 1]", "got nan at [0]"),
    (prm_loss, {"outcomes": t(1.0)}, ValueError, "outcomes: expected shape [3]", "[1]"),
    (prm_loss, {"groups": t(0, 4)}, ValueError, "cu_groups: expected to end at 3 responses", "got 4"),
    (prm_loss, {"groups": None, "kind": "dpo"}, ValueError, "cu_groups: expected the offsets of prompt groups", "None"),
    (prm_loss, {"kind": "mse"}, ValueError, "kind: expected one of 'ce', 'dpo', 'kto', 'nca', 'prefix'", "got 'mse'"),
    (prm_loss, {"beta": 0.0}, ValueError, "beta: expected a finite number in (0, inf)", "got 0.0"),
    (prm_loss, {"margin": -1.0}, ValueError, "margin: expected a finite number in [0, inf)", "got -1.0"),
    (prm_loss, {"weights": t(1.0, 2.0)}, ValueError, "weights: expected shape [3] as of outcomes", "[2]"),
    (prm_loss, {"weights": t(1.0, NAN, 1.0)}, ValueError, "weights: expected finite values", "got nan at [1]"),
    (prm_loss, {"shift": t(1, 2, 3)}, TypeError, "shift: expected dtype float32", "int64"),
    (prm_loss, {"shift": t(0.0, 0.0, -INF)}, ValueError, "shift: expected finite values", "got -inf at [2]"),
    (prm_loss, {"shift": torch.zeros(3, **META)}, ValueError, "shift: expected device cpu as of outcomes", "meta"),
    (prm_loss, {"shift": torch.zeros(3), "kind": "dpo"}, ValueError, "shift: expected None for kind='dpo'", "a tensor"),
    (
        prm_loss,
        {"weights": torch.ones(3), "kind": "kto"},
        ValueError,
        "weights: expected None for kind='kto'",
        "tensor",
    ),
]
OPERATIONS = sorted({case[0] for case in CASES}, key=lambda call: call.__name__)


@pytest.mark.parametrize("call, changed, error, expected, came", CASES, ids=lambda x: getattr(x, "__name__", None))
def test_message(call, changed, error, expected, came, backend):
    with pytest.raises(error, match=f"^{re.escape(expected)}.*{re.escape(came)}"), pk.use_backend(backend):
        call(**changed)


@pytest.mark.parametrize("call", OPERATIONS, ids=lambda call: call.__name__)
def test_valid_arguments_and_bad_backends(call):
    call()
    call(backend="eager")
    with pytest.raises(ValueError, match=r"^backend: expected one of 'eager'.*got 'gpu'"):
        call(backend="gpu")
    with pytest.raises(pk.BackendUnavailable, match=r"^backend: .*'triton'.* not available"):
        call(backend="triton")


def test_every_operation_has_cases():
    functions = {name for name in pk.__all__ if callable(getattr(pk, name)) and name.islower()}
    assert functions - {"use_backend", "available_backends"} == {call.__name__ for call in OPERATIONS}
