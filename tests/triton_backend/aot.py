"""Kernels compiled ahead of time for GPUs that need not be here: what they use, and their machine code."""

import re
import subprocess

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = [80, 90]
# Arguments that a real launch has as multiples of 16, besides addresses.
ALIGNED = {"vocabulary", "chunk", "width"}


def build(kernel, types, constants, capability, num_warps, tmp_path, num_stages=1, maxnreg=None):
    """(resource usage, SASS) of a kernel whose remaining arguments are ``constants``."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {name for name, kind in signature.items() if kind.startswith("*")} | ALIGNED
    source = ASTSource(
        kernel,
        signature,
        {name: constants[name] for name, kind in signature.items() if kind == "constexpr"},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(kernel.arg_names) if name in aligned},
    )
    compiled = triton.compile(
        source,
        GPUTarget("cuda", capability, 32),
        {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg, "debug": bool(kernel.debug)},
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
