"""Every Triton kernel compiled as real calls specialise it, for GPUs that need not be here.

Nothing spills, as many programs fit on a multiprocessor as are launched together, global memory is read and written by
16 bytes, and a kernel has no more instructions than machine_code.json says. To write that file anew after a change:

    PRIME_KERNELS_WRITE_BOUNDS=1 python -m pytest tests/triton_backend/test_specialised.py
"""

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'prime-process-rewards[triton]'")

import torch
import triton
from triton_backend import stand_in

from prime_kernels._backends import ClipRange, LinearHead, PPOTokens, PRMBatch, RlooBatch, RlooSettings, RowGradient
from prime_kernels._triton import head, losses, pack, rloo, rows, segments
from prime_kernels._triton._launch_config import HEAD_CONFIGS
from prime_kernels._triton._log_probs_kernels import forward_kernel

BOUNDS = Path(__file__).with_name("machine_code.json")
WRITE = "PRIME_KERNELS_WRITE_BOUNDS" in os.environ
# Another release of Triton brings another compiler, to which the numbers of instructions do not apply.
SAME_COMPILER = triton.__version__.startswith("3.6.")
# Of a multiprocessor; programs on each that wait for one another, so that they must be there together.
REGISTERS = 65536
PROGRAMS = dict.fromkeys(["scan", "sum", "returns", "returns,", "ppo", "ppo,", "prm"], 2)

ROWS, VOCABULARY, ODD = 8192, 151936, 50257
TOKENS, RESPONSES, GROUPS = 1_500_000, 512, 64


def tensor(*shape, dtype=torch.float32):
    """Without memory: shapes, strides and dtypes are all that a launch depends on."""
    return torch.empty(shape, dtype=dtype, device="meta")


def forward(models=1, entropy=True, count=ROWS, columns=VOCABULARY, dtype=torch.bfloat16, stride=None):
    logits = [tensor(count, stride or columns, dtype=dtype)[:, :columns] for _ in range(models)]
    mask = tensor(count, dtype=torch.bool)
    return rows.token_log_probs(logits, tensor(count, dtype=torch.int64), mask, [0.7] * models, entropy)


def candidates(count=ROWS, columns=VOCABULARY, dtype=torch.bfloat16):
    mask = tensor(count, dtype=torch.bool)
    rows.token_candidates(tensor(count, columns, dtype=dtype), tensor(count, dtype=torch.int64), mask, 0.7, -2.3, 11)


def backward(entropy=True, columns=VOCABULARY, dtype=torch.bfloat16, apart=False, to=None):
    logits, column = tensor(ROWS, columns, dtype=dtype), tensor(ROWS)
    gradient = RowGradient(column, *((column, column, column) if entropy else (None, column, None)))
    out = tensor(ROWS, columns + 1, dtype=dtype)[:, :-1] if apart else torch.empty_like(logits, dtype=to)
    ids, mask = tensor(ROWS, dtype=torch.int64), tensor(ROWS, dtype=torch.bool)
    rows.logits_gradient(logits, ids, mask, gradient, 0.7, out)


def product(columns=256, entropy=True, kept=None, scored=True, bias=False, vocabulary=VOCABULARY):
    hidden, weight = (tensor(count, 4096, dtype=torch.bfloat16) for count in (ROWS, vocabulary))
    biases = tensor(vocabulary, dtype=torch.bfloat16) if bias else None
    of = LinearHead(hidden, weight, biases, tensor(ROWS, dtype=torch.int64), 0.7, False)
    out = kept and tensor(ROWS, -(-vocabulary // columns) * columns, dtype=kept)[:, :vocabulary]
    stored = {"q" if kept == torch.float16 else "logits": out}
    if scored:
        head.token_log_probs(of, entropy, columns, **stored)
    elif kept == torch.float16:
        head.probabilities(of, out, columns)
    else:
        head.logits(of, out, columns)


def of_probabilities(columns=256, entropy=False, vocabulary=VOCABULARY):
    q = tensor(ROWS, -(-vocabulary // columns) * columns, dtype=torch.float16)[:, :vocabulary]
    of, row = head.Probabilities(q, tensor(ROWS, -(-vocabulary // columns))), tensor(ROWS)
    gradient = RowGradient(row, row if entropy else None, row, row if entropy else None)
    head.gradient(of, tensor(ROWS, dtype=torch.int64), row, gradient, 0.7, columns)


def offsets(count):
    return tensor(count + 1, dtype=torch.int64)


def scan(reverse=False, dtype=torch.float32, factor=None):
    segments.scan_segments(tensor(TOKENS, dtype=dtype), offsets(RESPONSES), 0.95, reverse, factor)


def fill():
    segments.fill_segments(tensor(RESPONSES, dtype=torch.float64), offsets(RESPONSES), TOKENS, tensor(1))


def returns(masked=False, process=True, baseline="reference", over_ranks=None):
    batch = RlooBatch(
        tensor(TOKENS) if process else None,
        tensor(TOKENS, dtype=torch.bool) if masked else None,
        tensor(RESPONSES, dtype=torch.float64),
        offsets(RESPONSES),
        offsets(GROUPS),
        TOKENS,
    )
    rloo.rloo_returns(batch, RlooSettings(0.95, 0.9, 5.0, 1.0, True, baseline), over_ranks)


def checks(masked):
    mask = tensor(TOKENS, dtype=torch.bool) if masked else None
    values = (tensor(TOKENS, dtype=torch.bfloat16), mask, tensor(RESPONSES))
    cu = (tensor(count + 1, dtype=torch.int32) for count in (RESPONSES, GROUPS))
    rloo.checked_batch(RlooBatch(*values, *cu, TOKENS))


def ppo(denominator=None, mask=True):
    tokens = PPOTokens(*(tensor(TOKENS) for _ in range(4)), tensor(TOKENS, dtype=torch.bool) if mask else None)
    losses.ppo_loss_and_scale(tokens, ClipRange(0.2, 0.2, 3.0), denominator)
    losses.ppo_gradient(tokens, ClipRange(0.2, 0.2, 3.0), tensor(1, dtype=torch.float64), tensor(1))


def prm(kind, balanced=False):
    column = tensor(RESPONSES, dtype=torch.float64)
    balance = (column, column) if balanced else (None, None)
    batch = PRMBatch(tensor(TOKENS), column, offsets(RESPONSES), offsets(GROUPS), *balance)
    if kind == "prefix":
        losses.prefix_loss_and_slope(batch, 10.0, 5.0)
    else:
        losses.prm_loss_and_slope(batch, kind, 0.05)


def packing(width, dtype):
    padded = tensor(RESPONSES, 4096, width, dtype=dtype)
    packed = pack.pack_tokens(padded, offsets(RESPONSES), TOKENS, True)
    pack.unpack_tokens(packed, offsets(RESPONSES), 4096, True, 0)


CASES = {
    "forward": forward,
    "forward, three models": lambda: forward(3, entropy=False),
    "forward, float32": lambda: forward(dtype=torch.float32),
    "forward, odd vocabulary": lambda: forward(columns=ODD),
    "forward, three models, odd vocabulary": lambda: forward(3, entropy=False, columns=ODD),
    "forward, float32, odd vocabulary": lambda: forward(dtype=torch.float32, columns=ODD),
    "forward, odd vocabulary, aligned rows": lambda: forward(columns=ODD, stride=ODD + 7),
    "forward, one row": lambda: forward(count=1),
    "forward, one row of three models, odd vocabulary": lambda: forward(3, entropy=False, count=2, columns=ODD),
    "candidates": candidates,
    "candidates, float32, odd vocabulary": lambda: candidates(dtype=torch.float32, columns=ODD),
    "candidates, one row": lambda: candidates(count=1),
    "backward": backward,
    "backward, no entropy": lambda: backward(entropy=False),
    "backward, float32": lambda: backward(dtype=torch.float32),
    "backward, odd vocabulary": lambda: backward(columns=ODD),
    "backward, float32, odd vocabulary": lambda: backward(dtype=torch.float32, columns=ODD),
    "backward, float32 to bfloat16": lambda: backward(dtype=torch.float32, to=torch.bfloat16),
    "backward, float32 to bfloat16, no entropy": lambda: backward(False, dtype=torch.float32, to=torch.bfloat16),
    "backward, float32 to float16": lambda: backward(dtype=torch.float32, to=torch.float16),
    "backward into rows that start elsewhere": lambda: backward(columns=ODD, apart=True),
    "product and softmax": product,
    "product and softmax, no entropy": lambda: product(entropy=False),
    "product and softmax, logits kept": lambda: product(kept=torch.float32),
    "product and softmax, logits kept, bias, odd vocabulary": lambda: product(
        kept=torch.float32, bias=True, vocabulary=ODD
    ),
    "product and softmax, two programs": lambda: product(columns=128, kept=torch.float32),
    "product and softmax, probabilities kept": lambda: product(kept=torch.float16),
    "product and softmax, probabilities kept, no entropy": lambda: product(kept=torch.float16, entropy=False),
    "product and softmax, probabilities kept, odd vocabulary": lambda: product(kept=torch.float16, vocabulary=ODD),
    "product and softmax, probabilities kept, two programs": lambda: product(columns=128, kept=torch.float16),
    "product alone": lambda: product(kept=torch.float32, scored=False),
    "product and probabilities": lambda: product(kept=torch.float16, scored=False),
    "of probabilities": of_probabilities,
    "of probabilities, entropy, odd vocabulary": lambda: of_probabilities(entropy=True, vocabulary=ODD),
    "of probabilities, tiles of 128": lambda: of_probabilities(columns=128),
    "scan": scan,
    "scan of float64 in reverse": lambda: scan(True, torch.float64, tensor(1)),
    "sum": lambda: segments.sum_segments(tensor(TOKENS), offsets(RESPONSES)),
    "fill": fill,
    "returns": returns,
    "returns, masked": lambda: returns(masked=True),
    "returns, paper": lambda: returns(baseline="paper"),
    "returns of outcomes": lambda: returns(process=False),
    "returns over ranks": lambda: returns(masked=True, over_ranks=lambda largest: None),
    "whiten": lambda: rloo.whiten(tensor(TOKENS), tensor(123, 3, dtype=torch.float64)),
    "checks": lambda: checks(masked=True),
    "ppo": ppo,
    "ppo, denominator": lambda: ppo(7.5, mask=False),
    "prm ce, balanced": lambda: prm("ce", balanced=True),
    "prm dpo": lambda: prm("dpo"),
    "prm kto": lambda: prm("kto"),
    "prm nca": lambda: prm("nca"),
    "prm prefix, balanced": lambda: prm("prefix", balanced=True),
    "pack, rows of 8 KiB": lambda: packing(4096, torch.int16),
    "pack, single tokens": lambda: packing(1, torch.int64),
}
# Compiled for older GPUs, too.
OLDER = ["forward", "forward, odd vocabulary", "backward, odd vocabulary", "returns, masked", "prm prefix, balanced"]
EACH = [(name, 90) for name in CASES] + [(name, 80) for name in OLDER]
# Waits for the whole grid, each an atomic that tells of a program's arrival.
BARRIERS = {
    "scan": [2],
    "sum": [1],
    "returns": [4],
    "returns of outcomes": [2],
    "returns over ranks": [2, 2],
    "ppo": [1, 0],
}
BARRIERS |= {"returns, masked": [4], "prm dpo": [1], "prm prefix, balanced": [2], "forward": [0]}


def assert_products_overlap(kernel, name):
    """Programs fit, and the next step of the product begins while the one before runs: one wait a step, and the last.

    ptxas would put a wait after each instruction if it could not tell that nobody touches the accumulators.
    """
    config = HEAD_CONFIGS[128 if "two" in name else 256]
    assert (kernel.shared + stand_in.RESERVED) * config.programs <= stand_in.SHARED[90]
    assert kernel.registers * kernel.warps * 32 * config.programs <= REGISTERS
    assert kernel.count(rf"HGMMA\.64x{config.block_columns}x16\.F32\.BF16") == 4 * config.block_rows // (
        16 * kernel.warps
    )
    assert kernel.count(r"WARPGROUP\.ARRIVE") == 1 and kernel.count(r"WARPGROUP\.DEPBAR") == 2
    assert kernel.count(r"UTMALDG\.2D") == 2 * config.num_stages


def measured(kernel):
    narrow = {
        f"narrow {transfer}": sum(kernel.widths(transfer)[bits] for bits in (32, 64)) for transfer in ("LDG", "STG")
    }
    return {
        "kernel": kernel.name,
        "registers": kernel.registers,
        "instructions": kernel.instructions,
        "loop": kernel.loop,
        **narrow,
    }


@pytest.fixture(scope="module")
def bounds():
    found = json.loads(BOUNDS.read_text()) if BOUNDS.exists() else {}
    yield found
    if WRITE:
        wanted = {f"{name}, sm_{capability}" for name, capability in EACH}
        BOUNDS.write_text(json.dumps({key: found[key] for key in sorted(wanted & {*found})}, indent=1) + "\n")


@pytest.mark.parametrize("name, capability", EACH)
def test_machine_code(name, capability, bounds):
    with stand_in.on(capability) as seen:
        CASES[name]()
    assert seen
    for kernel in seen:
        # Calls of assertions have a frame.
        assert kernel.stack <= (32 if name == "checks" else 0) and not kernel.count(r"(LDL|STL)\b"), kernel[:4]
        assert kernel.registers * kernel.warps * 32 * PROGRAMS.get(name.split()[0], 1) <= REGISTERS
    if name in BARRIERS:
        assert [kernel.count(r"ATOMG\.E\.ADD\.STRONG\.GPU") for kernel in seen] == BARRIERS[name]
    if name.startswith("product"):
        assert_products_overlap(seen[0], name)
    if name == "checks":
        assert seen[0].count(r"CALL\.ABS") >= 8
    found, key = [measured(kernel) for kernel in seen], f"{name}, sm_{capability}"
    if WRITE:
        bounds[key] = found
    elif SAME_COMPILER:
        for got, bound in zip(found, bounds[key], strict=True):
            assert got["kernel"] == bound["kernel"] and got["registers"] <= max(128, bound["registers"])
            for what in ("instructions", "loop", "narrow LDG", "narrow STG"):
                assert got[what] <= 1.03 * bound[what], f"{key}: {what}: {got[what]}, and {bound[what]} before"


def test_rows_at_any_address_come_in_by_16_bytes(bounds):
    """As aligned ones do: what is narrower are scalars, and the columns beside the first and last 16 bytes."""
    pairs = [("forward", "forward, odd vocabulary, aligned rows")]
    for name in ("forward", "forward, three models", "forward, float32", "backward", "backward, float32"):
        pairs.append((name, f"{name}, odd vocabulary"))
    for name, other in pairs:
        aligned, odd = bounds[f"{name}, sm_90"][0], bounds[f"{other}, sm_90"][0]
        assert all(odd[narrow] <= aligned[narrow] + 2 for narrow in ("narrow LDG", "narrow STG")), other


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_sums_have_the_same_order_at_any_address(dtype):
    """A lane's columns are the same ones of one thread: equal logits give equal bits."""
    forward_kernel.device_caches.pop(90, None)
    with stand_in.on(90):
        forward(dtype=dtype)
        forward(columns=ODD, dtype=dtype)
    found = []
    for kernel in forward_kernel.device_caches[90][0].values():
        text = kernel.asm["ttgir"]
        reduced = re.findall(r"^\s*\}\) : \(tensor<\d+x\d+xf32, (#\w+)>\)", text, re.MULTILINE)
        found.append([re.search(rf"^{layout} = (.*)$", text, re.MULTILINE).group(1) for layout in reduced])
    assert len(found) == 2 and found[0] and found[0] == found[1], found
