"""Every Triton kernel compiled ahead of time for GPUs that need not be here: no spills, 16-byte loads and stores.

The specialization is that of a real launch: 16-byte aligned addresses, a vocabulary that is a multiple of 16.
"""

import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-process-rewards[triton]'")

import torch
from triton_backend.aot import CAPABILITIES, assert_no_spills, build

from prime_kernels._triton import _log_probs_kernels as kernels
from prime_kernels._triton._launch_config import Device, choose, choose_linear
from prime_kernels._triton._linear_kernels import linear_forward_kernel

DTYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
ROWS, VOCABULARY = 8192, 151936

COMMON = {
    "ids_ptr": "*i64",
    "mask_ptr": "*u8",
    "lse_ptr": "*fp32",
    "entropy_ptr": "*fp32",
    "vocabulary": "i32",
    "chunk": "i32",
}
RESULTS = {"logp_ptr": "*fp32", "partial_ptr": "*fp32", "rows": "i64"}
INVERSES = {f"inverse_{model}": "fp32" for model in "abc"}


def config_for(dtype, capability, rows=ROWS):
    return choose(rows, VOCABULARY, dtype.itemsize, Device(132, divmod(capability, 10)))


@pytest.mark.parametrize("models, entropy, rows", [(1, True, ROWS), (3, False, ROWS), (1, True, 1), (3, False, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forward(capability, dtype, models, entropy, rows, tmp_path):
    config = config_for(dtype, capability, rows * models)
    assert (config.splits > 1) == (rows == 1)
    types = COMMON | RESULTS | INVERSES | {f"{model}_ptr": DTYPES[dtype] for model in "abc"}
    types |= {f"stride_{model}": "i64" for model in "abc"}
    constants = {"MODELS": models, "MASKED": True, "ENTROPY": entropy, "SPLITS": config.splits}
    constants |= {"ALIGNMENT": 8, "WIDTH": 16 // dtype.itemsize, "BLOCK": config.block}
    usage, sass = build(kernels.forward_kernel, types, constants, capability, config.num_warps, tmp_path)
    assert_no_spills(usage, sass)
    # Half of the register file still holds two of the largest programs.
    assert usage["REG"] <= 128
    # The whole blocks and the last one: everything but a scalar or two comes in by 16 bytes.
    a_block = config.block * dtype.itemsize // (config.num_warps * 32 * 16)
    assert len(re.findall(r"\bLDG\.E[.\w]*\.128", sass)) >= 2 * a_block


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_backward(capability, dtype, entropy, tmp_path):
    config = config_for(dtype, capability)
    types = COMMON | {"logits_ptr": DTYPES[dtype], "out_ptr": DTYPES[dtype], "inverse": "fp32"}
    types |= {"stride": "i64", "out_stride": "i64", "grad_logp_ptr": "*fp32", "grad_entropy_ptr": "*fp32"}
    constants = {"MASKED": True, "ENTROPY": entropy, "ALIGNMENT": 8, "BLOCK": config.block}
    usage, sass = build(kernels.backward_kernel, types, constants, capability, config.num_warps, tmp_path)
    assert_no_spills(usage, sass)
    assert usage["REG"] <= 128
    a_block = config.block * dtype.itemsize // (config.num_warps * 32 * 16)
    for transfer in ("LDG", "STG"):
        assert len(re.findall(rf"\b{transfer}\.E[.\w]*\.128", sass)) >= 2 * a_block


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_combine(capability, tmp_path):
    types = {key: COMMON[key] for key in ("mask_ptr", "lse_ptr", "entropy_ptr")} | RESULTS | INVERSES
    constants = {"MODELS": 3, "MASKED": True, "ENTROPY": True, "SPLITS": 64, "ONE_OWNER": True}
    assert_no_spills(*build(kernels.combine_kernel, types, constants, capability, 1, tmp_path))


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_fused_product(capability, entropy, tmp_path):
    """On Hopper: tiles come by bulk copies (TMA), products are warpgroup instructions, nothing spills."""
    config = choose_linear(ROWS, VOCABULARY, 2, Device(132, divmod(capability, 10)))
    a, b = (f"tensordesc<bf16[{rows}, {config.block_width}]>" for rows in (config.block_rows, config.block_columns))
    types = {"hidden": a, "weight": b, "bias_ptr": "*bf16", "ids_ptr": "*i64", "inverse": "fp32", "rows": "i32"}
    types |= {"partial_ptr": "*fp32", "vocabulary": "i32", "width": "i32", "chunk": "i32"}
    constants = {"BIAS": False, "ENTROPY": entropy, "SPLITS": config.splits, "PROGRAMS": config.programs}
    constants |= {"BLOCK_ROWS": config.block_rows, "BLOCK_COLUMNS": config.block_columns}
    constants |= {"BLOCK_WIDTH": config.block_width}
    options = (capability, config.num_warps, tmp_path, config.num_stages)
    usage, sass = build(linear_forward_kernel, types, constants, *options)
    assert_no_spills(usage, sass)
    assert usage["REG"] * config.num_warps * 32 <= 65536
    if capability >= 90:
        assert re.search(r"\bUTMALDG\b", sass) and re.search(r"\bHGMMA\.", sass)
    else:
        assert re.search(r"\bHMMA\.", sass)
