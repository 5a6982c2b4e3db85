"""Every Triton kernel compiled ahead of time for GPUs that need not be here: no spills, 16-byte loads and stores.

The specialization is that of a real launch: 16-byte aligned addresses, a vocabulary that is a multiple of 16.
"""

import os
import re
import subprocess

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-kernels[triton]'")

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prime_kernels._triton import _log_probs_kernels as kernels
from prime_kernels._triton._config import Device, choose, choose_linear
from prime_kernels._triton._linear_kernels import linear_forward_kernel

CAPABILITIES = [80, 90]
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


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    before = os.environ.get("TRITON_CACHE_DIR")
    os.environ["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    yield
    if before is None:
        del os.environ["TRITON_CACHE_DIR"]
    else:
        os.environ["TRITON_CACHE_DIR"] = before


def config_for(dtype, capability, rows=ROWS):
    return choose(rows, VOCABULARY, dtype.itemsize, Device(132, divmod(capability, 10)))


def build(kernel, types, constants, capability, num_warps, tmp_path, num_stages=1):
    """(resource usage, SASS) of a kernel whose remaining arguments are ``constants``."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | {"vocabulary", "chunk"}
    source = ASTSource(
        kernel,
        signature,
        {name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name in aligned},
    )
    compiled = triton.compile(
        source, GPUTarget("cuda", capability, 32), {"num_warps": num_warps, "num_stages": num_stages}
    )
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin)
    (used,) = re.findall(r"REG:\d+ .*", usage)
    fields = {name: int(value) for name, value in re.findall(r"(\w+(?:\[\d+\])?):(\d+)", used)}
    return fields, output(knobs.nvidia.nvdisasm.path, "-c", cubin)


def output(*command):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout


def assert_no_spills(usage, sass):
    assert usage["STACK"] == usage["LOCAL"] == 0, usage
    assert not re.search(r"\b(LDL|STL)\b", sass)


@pytest.mark.parametrize("models, entropy, rows", [(1, True, ROWS), (3, False, ROWS), (1, True, 1), (3, False, 1)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_forward(capability, dtype, models, entropy, rows, tmp_path):
    config = config_for(dtype, capability, rows * models)
    assert (config.splits > 1) == (rows == 1)
    types = COMMON | RESULTS | INVERSES | {f"{model}_ptr": DTYPES[dtype] for model in "abc"}
    types |= {f"stride_{model}": "i64" for model in "abc"}
    constants = {"MODELS": models, "MASKED": True, "ENTROPY": entropy, "SPLITS": config.splits}
    constants |= {"UNIT": 8, "WIDTH": 16 // dtype.itemsize, "BLOCK": config.block}
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
    constants = {"MASKED": True, "ENTROPY": entropy, "UNIT": 8, "BLOCK": config.block}
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
