"""The kernels over packed tokens compiled ahead of time: no spills, and programs that fit beside each other."""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-process-rewards[triton]'")

from triton_backend.aot import CAPABILITIES, assert_no_spills, build

from prime_kernels._triton import _pack_kernels as pack
from prime_kernels._triton import _ppo_kernels as ppo
from prime_kernels._triton import _rloo_kernels as rloo
from prime_kernels._triton import _segments_kernels as segments
from prime_kernels._triton._check_kernels import check_rloo_kernel
from prime_kernels._triton._launch_config import PREFIX_TUNING, Device, choose_pack, choose_scan
from prime_kernels._triton._prefix_kernels import prefix_kernel
from prime_kernels._triton._prm_kernels import prm_kernel
from prime_kernels._triton.losses import RESPONSES
from prime_kernels._triton.rloo import CHECKED, ROWS
from prime_kernels._triton.rloo import RESPONSES as GROUPED_RESPONSES

CONFIG = choose_scan(1_500_000, Device(132, (9, 0)))
SCAN_TUNING = {"BLOCK": CONFIG.block, "SLOTS": CONFIG.slots}
REGISTERS = 65536

FLOATS = "values out logp old advantages weights grad log_ratio rewards returns loss accuracy clip_fraction approx_kl"
DOUBLES = "published sums factor denominator scale outcomes slope deltas scores shift stats columns largest"
TYPES = {f"{name}_ptr": "*fp32" for name in FLOATS.split()} | {f"{name}_ptr": "*fp64" for name in DOUBLES.split()}
TYPES |= {"mask_ptr": "*u8", "counter_ptr": "*i32", "cu_ptr": "*i64", "groups_ptr": "*i64"}
TYPES |= {name: "i64" for name in ("total", "places", "length", "fill")}
TYPES |= {name: "i32" for name in ("segments", "responses", "groups", "tiles", "rows", "width")}
TYPES |= {name: "fp64" for name in ("gamma", "log2_gamma", "gamma_process", "log2_gamma_process", "log2_gamma_outcome")}
TYPES |= {name: "fp64" for name in ("process_coef", "outcome_coef", "beta", "margin", "denominator")} | {
    "low": "fp32",
    "high": "fp32",
}

pytestmark = pytest.mark.parametrize("capability", CAPABILITIES)


def compiled(kernel, constants, capability, tmp_path, types=None, num_warps=CONFIG.num_warps):
    """The machine code of a kernel that has no spills, and of which a multiprocessor holds a program."""
    maxnreg = CONFIG.registers if "SLOTS" in kernel.arg_names else None
    usage, sass = build(kernel, TYPES | (types or {}), constants, capability, num_warps, tmp_path, maxnreg=maxnreg)
    assert_no_spills(usage, sass)
    assert usage["REG"] * 32 * num_warps <= REGISTERS
    return sass


def barriers(sass):
    """Places where a program waits for others: atomics that tell of it, each followed by one that polls."""
    return len(re.findall(r"\bATOMG\.E\.ADD\.STRONG\.GPU", sass))


@pytest.mark.parametrize("dtype, reverse", [("*fp32", False), ("*fp32", True), ("*fp64", True)])
def test_scan(capability, dtype, reverse, tmp_path):
    constants = SCAN_TUNING | {"REVERSE": reverse, "SCALED": reverse, "FIRST": 0, "LAST": 1}
    types = {"values_ptr": dtype, "out_ptr": dtype, "factor_ptr": "*fp32"}
    assert barriers(compiled(segments.scan_kernel, constants, capability, tmp_path, types)) == 2


def test_sum(capability, tmp_path):
    assert barriers(compiled(segments.sum_kernel, SCAN_TUNING, capability, tmp_path)) == 1


def test_fill(capability, tmp_path):
    constants = {"SCALED": True, "BLOCK": CONFIG.block}
    compiled(segments.fill_kernel, constants, capability, tmp_path, {"values_ptr": "*fp64"})


# Masked or not, first and last phase, places where programs meet: in one launch, in two, and for outcomes alone.
@pytest.mark.parametrize(
    "masked, first, last, meetings",
    [(False, 0, 3, 4), (True, 0, 3, 4), (True, 0, 1, 2), (True, 2, 3, 2), (None, 2, 3, 2)],
)
def test_returns(capability, masked, first, last, meetings, tmp_path):
    process = masked is not None
    constants = {"PROCESS": process, "MASKED": bool(masked), "NORMALIZE": process, "PAPER": False}
    constants |= {"ACROSS": process and last - first == 1, "RESPONSES": GROUPED_RESPONSES, "FIRST": first, "LAST": last}
    sass = compiled(rloo.rloo_kernel, SCAN_TUNING | constants, capability, tmp_path)
    assert barriers(sass) == meetings


def test_whiten(capability, tmp_path):
    compiled(rloo.whiten_kernel, {"ROWS": ROWS, "BLOCK": CONFIG.block}, capability, tmp_path)


@pytest.mark.parametrize("denominator", ["count", "number"])
def test_ppo(capability, denominator, tmp_path):
    constants = {"MASKED": True, "WEIGHTED": True, "BLOCK": CONFIG.block}
    forward = constants | {"DENOMINATOR": denominator, "SLOTS": CONFIG.slots}
    assert barriers(compiled(ppo.ppo_forward_kernel, forward, capability, tmp_path)) == 1
    compiled(ppo.ppo_backward_kernel, constants, capability, tmp_path)


@pytest.mark.parametrize("kind, grouped", [("ce", False), ("kto", True), ("dpo", True), ("nca", True)])
def test_prm(capability, kind, grouped, tmp_path):
    balanced = {"WEIGHTED": kind == "ce", "SHIFTED": kind == "ce"}
    constants = SCAN_TUNING | balanced | {"KIND": kind, "GROUPED": grouped, "RESPONSES": RESPONSES}
    types = {"weights_ptr": "*fp64"}
    assert barriers(compiled(prm_kernel, constants, capability, tmp_path, types)) == 1


@pytest.mark.parametrize("balanced", [False, True])
def test_prefix(capability, balanced, tmp_path):
    constants = {"GROUPED": True, "WEIGHTED": balanced, "SHIFTED": balanced, "RESPONSES": RESPONSES}
    constants |= SCAN_TUNING | {"BLOCK": PREFIX_TUNING.block, "FIRST": 0, "LAST": 1}
    types = {"slope_ptr": "*fp32", "weights_ptr": "*fp64"}
    assert barriers(compiled(prefix_kernel, constants, capability, tmp_path, types)) == 2


@pytest.mark.parametrize("kind, width", [("*i16", 4096), ("*i64", 1)])
def test_pack(capability, kind, width, tmp_path):
    config = choose_pack(width)
    constants = {"LEFT": True, "TOKENS": config.tokens, "WIDTH": config.width}
    types = {f"{name}_ptr": kind for name in ("padded", "values", "out")}
    for kernel in (pack.pack_kernel, pack.unpack_kernel):
        narrow = {"width": "constexpr"} if width == 1 else {}
        sass = compiled(kernel, constants | {"width": 1}, capability, tmp_path, types | narrow, config.num_warps)
        if width > 1:
            # Tokens of whole 16-byte pieces move in these.
            for transfer in ("LDG", "STG"):
                assert re.search(rf"\b{transfer}\.E[.\w]*\.128", sass)


@pytest.mark.parametrize("masked", [False, True])
def test_checks(capability, masked, tmp_path):
    """Assertions are there: without debug=True they would compile to nothing."""
    flags = {name: True for name in check_rloo_kernel.arg_names if name.startswith("COPY_")}
    types = {"rewards_ptr": "*bf16", "outcomes_ptr": "*fp32", "cu_ptr": "*i32", "groups_ptr": "*i32"}
    types |= {"rewards_copy_ptr": "*fp32", "outcomes_copy_ptr": "*fp64", "cu_copy_ptr": "*i64"}
    types |= {"groups_copy_ptr": "*i64", "total": "i64", "responses": "i64", "groups": "i64"}
    constants = flags | {"PROCESS": True, "MASKED": masked, "BLOCK": CHECKED}
    usage, sass = build(check_rloo_kernel, TYPES | types, constants, capability, 4, tmp_path)
    assert sass.count("CALL.ABS") >= 8 and usage["STACK"] <= 32, usage
