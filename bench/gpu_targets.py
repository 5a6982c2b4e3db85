"""Times on an H100 and an H200 by calculation, before anything has run on one: the tables of docs/gpu_targets.md.

    python bench/gpu_targets.py [PAGE]

Prints the tables, or writes them between the marks of PAGE. Products, launches and bytes are counted while the
operations run on tensors without data; instructions are those of tests/triton_backend/machine_code.json.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prime_kernels import _backends
from prime_kernels._backends import LinearHead, RowGradient, RowResults
from prime_kernels._triton._launch_config import PROGRAMS_PER_MULTIPROCESSOR, Device, choose
from prime_kernels.ops import _tiled_head, linear_losses
from prime_kernels.ops.linear_log_probs import Settings

# (tokens, width, vocabulary)
LLAMA, QWEN = (8192, 4096, 131072), (8192, 3584, 152064)

MARKS = ("<!-- tables -->", "<!-- end of tables -->")
UNMEASURED = "not yet measured"
MACHINE_CODE = Path(__file__).parents[1] / "tests" / "triton_backend" / "machine_code.json"

# Rates of an H100 80GB, measured elsewhere: a copy in device memory, a bfloat16 product of 8,192^3. Of an H200 the peak
# is known; it is taken to reach the same share of that, and to multiply as fast: it is the same chip.
COPY, PEAK, PEAK_H200, PRODUCT = 3.0e12, 3.35e12, 4.8e12, 798e12
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.755e9
# Assumed: of a launch and the end of the one before it; of a barrier over the grid; reads that hit the L2 cache.
LAUNCH, BARRIER, L2_RATE = 4e-6, 2e-6, 5.5e12
# Of one 16-byte load each in flight, a thread's loop takes so many bytes (Tuning of _launch_config.py).
BYTES_PER_LOOP = 64
# Operators that launch nothing: they ask, allocate, or look at memory another way.
FREE = {"empty", "new_empty", "empty_like", "_unsafe_view", "device", "is_same_size"}
# Of the product with the softmax in its epilogue, tiles of 128 x 256 on 8 warps, as its machine code for sm_90 has them
# (tests/triton_backend/test_specialised.py bounds them): instructions a warp and tile outside the loop over the width,
# beside them those that only tiles with a target or the vocabulary's end take, and those that store float32 logits, or
# probabilities in 16 bits, which go through shared memory so that a thread has 16 bytes of a row.
EPILOGUE, SPECIAL, STORES = 1360, 700, {"": 0, "logits": 820, "probabilities": 450}
# Bytes a cycle that a multiprocessor's shared memory takes or gives.
SHARED_A_CYCLE = 128
# Exponentials of a tile, a thread; a multiprocessor makes 16 a cycle.
EXPONENTIALS, EXPONENTIALS_A_CYCLE = 128, 16
# Assumed: cycles until the first step of a tile is in shared memory, and the share of the library's rate at which the
# product runs between epilogues.
FIRST_STEP, OWN_PRODUCT = 1000, (0.9, 1.0)
# Barriers over the grid in rloo_advantages; tests/triton_backend/test_specialised.py counts them in machine code.
RLOO_BARRIERS = 4


class Gpu(NamedTuple):
    name: str
    copy: float
    """Bytes a second."""
    product: float
    """Floating-point operations a second."""


H100 = Gpu("H100", COPY, PRODUCT)
H200 = Gpu("H200", PEAK_H200 * COPY / PEAK, PRODUCT)


@dataclass
class Work:
    """What calls do on a GPU."""

    flops: list[int] = field(default_factory=list)
    """Of each product."""
    of_products: int = 0
    """Bytes that products read and write."""
    of_kernels: int = 0
    """Bytes that everything else reads and writes."""
    launches: int = 0
    tails: float = 0.0
    """Bytes that could have moved while the last programs of row kernels ran."""
    issue: float = 0.0
    """The largest share of the issue slots that a row kernel takes while its bytes move."""
    barriers: int = 0

    def seconds(self, gpu: Gpu, exposed: bool) -> float:
        """Products hide what they read and write themselves, or nothing of it if ``exposed``."""
        moved = self.of_kernels * max(1.0, self.issue) + self.tails + exposed * self.of_products
        return sum(self.flops) / gpu.product + moved / gpu.copy + LAUNCH * self.launches + BARRIER * self.barriers


def instructions(case: str, itemsize: int) -> float:
    """Instructions for 32 elements in the loop of a case's first kernel in machine_code.json."""
    loop: int = json.loads(MACHINE_CODE.read_text())[f"{case}, sm_90"][0]["loop"]
    return loop * 32 / (BYTES_PER_LOOP / itemsize)


def issue_share(case: str, itemsize: int, moved: float) -> float:
    """Of the slots there are while an element's ``moved`` bytes are copied, at most."""
    slots = MULTIPROCESSORS * SCHEDULERS * CLOCK * 32 * 32 * moved / COPY
    return instructions(case, itemsize) / slots


class Counting(TorchDispatchMode):
    """Counts what would be launched, and stands in for the row kernels of a backend."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in ("mm", "addmm"):
            a, b = [each for each in args if isinstance(each, Tensor)][-2:]
            self.work.flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
            self.work.of_products += _bytes([*args, result])
            self.work.launches += 1
        elif name not in FREE and not func.is_view:
            tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            self.work.of_kernels += _bytes([*tensors, result])
            self.work.launches += 1
        return result

    def row_kernel(self, case: str, read: list[Tensor], written: Tensor | None = None) -> None:
        rows, columns = read[0].shape
        moved = _bytes(read) + (0 if written is None else _bytes([written]))
        each = moved / len(read) / (rows * columns)
        self.work.of_kernels += moved
        self.work.launches += 1
        # Half of a wave in which fewer and fewer multiprocessors have a program.
        self.work.tails += 0.5 * moved / len(read) / rows * MULTIPROCESSORS * PROGRAMS_PER_MULTIPROCESSOR
        self.work.issue = max(self.work.issue, issue_share(case, read[0].element_size(), each))

    def token_log_probs(
        self, models: list[Tensor], ids: Tensor, mask: Tensor | None, temperatures: list[float], with_entropy: bool
    ) -> RowResults:
        case = "forward, three models" if len(models) == 3 else "forward"
        self.row_kernel(case + ", float32" * (models[0].dtype == torch.float32), models)
        found = [models[0].new_empty(len(models), len(ids), dtype=torch.float32) for _ in range(3)]
        return RowResults(found[0], found[1], found[2] if with_entropy else None)

    def logits_gradient(
        self,
        logits: Tensor,
        ids: Tensor,
        mask: Tensor | None,
        gradient: RowGradient,
        temperature: float,
        out: Tensor,
        partial: bool = False,
    ) -> None:
        wide = logits.dtype == torch.float32
        case = "backward" + ", float32" * wide + " to bfloat16" * (wide and out.dtype == torch.bfloat16)
        plain = gradient.grad_entropy is None and case != "backward, float32"
        self.row_kernel(f"{case}, no entropy" if plain else case, [logits], out)


def _bytes(tensors: Iterable[Any]) -> int:
    return sum(each.numel() * each.element_size() for each in tensors if isinstance(each, Tensor))


def counted(call: Callable[[Counting], object], **sizes: object) -> Work:
    """The work of a call on a GPU of 80 GB; ``sizes`` replace constants of the tiles."""
    # Only sizes of the GPU that is meant, whatever is here.
    with mock.patch.object(torch.cuda, "is_available", lambda: False), mock.patch.dict(vars(_tiled_head), sizes):
        counting = Counting()
        with mock.patch.object(_backends, "rows", lambda backend: counting), counting:
            call(counting)
    return counting.work


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def logits_level(models: int, backward: bool = False) -> Callable[[Counting], object]:
    def call(kernels: Counting) -> None:
        logits, ids = [tensor(8192, 151936) for _ in range(models)], tensor(8192, dtype=torch.int64)
        if backward:
            column = tensor(8192, dtype=torch.float32)
            gradient = RowGradient(column, column, column, column)
            kernels.logits_gradient(logits[0], ids, None, gradient, 1.0, torch.empty_like(logits[0]))
        else:
            kernels.token_log_probs(logits, ids, None, [1.0] * models, models == 1)

    return call


def candidates(kernels: Counting) -> None:
    """The plain pass, the maxima of lanes written and read, and 0.5 % of the logits read again."""
    logits = tensor(8192, 151936)
    kernels.row_kernel("candidates", [logits])
    config = choose(*logits.shape, logits.element_size(), Device(MULTIPROCESSORS))
    lanes = 8192 * config.splits * config.block // 8 * 4
    kernels.work.of_kernels += 2 * lanes + _bytes([logits]) // 200
    kernels.work.launches += 1


def head(n: int, d: int, v: int) -> LinearHead:
    return LinearHead(tensor(n, d), tensor(v, d), None, tensor(n, dtype=torch.int64), 1.0, rounded=False)


def linear(n: int, d: int, v: int, backward: bool = False) -> Callable[[Counting], object]:
    def call(kernels: Counting) -> None:
        made = head(n, d, v)
        results, kept = _tiled_head.head_log_probs(made, True, "cuda", backward and _tiled_head.can_keep(made, "cuda"))
        if backward:
            gradient = RowGradient(results.lse, None, results.logp, None)
            _tiled_head.head_gradients(made, gradient, [True, True, False], "cuda", kept)

    return call


def none_kept(device_type: str) -> int:
    """In place of kept_bytes: as where memory is short."""
    return 0


def nll(n: int, d: int, v: int) -> Callable[[Counting], object]:
    def call(kernels: Counting) -> None:
        leaves = [tensor(n, d).requires_grad_(), tensor(v, d).requires_grad_()]
        settings = Settings(1.0, None, with_entropy=False, rounded=False, backend="cuda")
        ids = tensor(n, dtype=torch.int64)
        loss, *_ = linear_losses.FusedLoss.apply(*leaves, None, ids, settings, lambda logp, span: (-logp.sum() / n,))
        torch.autograd.grad(loss, leaves)

    return call


def packed(launches: int, moved: int, barriers: int = 0) -> Work:
    """Bytes a token of 1,500,000; they stay in the L2 cache between launches, but not between calls."""
    return Work(of_kernels=moved * 1_500_000, launches=launches, barriers=barriers)


class Row(NamedTuple):
    what: str
    work: Work
    target: float | None
    """Seconds on an H100, at most."""
    bar: float | None
    """Seconds that somebody else needs there."""
    note: str


def rows() -> list[Row]:
    plain, three, back = (counted(logits_level(*given)) for given in ((1,), (3,), (1, True)))
    made = [
        Row("`log_probs` with entropy, [8192, 151936]", plain, None, 0.89e-3, "TRL's kernel"),
        Row("`log_ratios` of three, [8192, 151936]", three, three.of_kernels / COPY / 0.93, None,
            "93 % of the copy rate"),
        Row("gradient of `log_probs`, entropy too", back, back.of_kernels / COPY / 0.92, None,
            "92 % of the copy rate"),
        Row("`candidates`, [8192, 151936]", counted(candidates), 1.05 * plain.seconds(H100, False), None,
            "1.05 times the pass without"),
    ]  # fmt: skip
    for shape, bars in ((LLAMA, (12.30e-3, 50.2e-3)), (QWEN, (None, None))):
        name = " x ".join(map(str, shape))
        scale = shape[0] * shape[1] * shape[2] / (LLAMA[0] * LLAMA[1] * LLAMA[2])
        flops = 2 * shape[0] * shape[1] * shape[2]
        made += [
            Row(f"`linear_log_probs`, {name}", counted(linear(*shape)), flops / 745e12, bars[0],
                "the softmax in the product's epilogue (`fused_columns`)"),
            Row("the same, both ways", counted(linear(*shape, backward=True)), 47e-3 * scale, bars[1],
                "the softmax in the product's epilogue"),
            Row("the same, logits not kept", counted(linear(*shape, backward=True), kept_bytes=none_kept),
                47e-3 * scale, bars[1], "memory for the logits, which leaves three products of four"),
            Row(f"`linear_nll`, both ways, {name}", counted(nll(*shape)), 36e-3 * scale, None,
                "the softmax in the product's epilogue, which leaves probabilities for the gradient"),
        ]  # fmt: skip
    latency = "latency decides: the constants are guesses"
    return [
        *made,
        Row("`rloo_advantages`, 1.5 million tokens", packed(3, 20, RLOO_BARRIERS), None, None, latency),
        Row("`segment_scan`", packed(1, 8, 2), None, None, latency),
        Row("`segment_sum`, `step_rewards`", packed(1, 4, 1), None, None, latency),
        Row("`ppo_loss`, both ways", packed(2, 36, 1), None, None, latency),
        Row("`prm_loss`, both ways", packed(2, 8, 1), None, None, latency),
    ]


def verdict(work: Work, target: float | None, bar: float | None, note: str) -> str:
    """How both ends of the calculation stand to the target and to the bar."""
    fast, slow = (work.seconds(H100, exposed) for exposed in (False, True))
    said = []
    for name, limit in (("target", target), ("bar", bar)):
        if limit is None:
            continue
        if slow <= limit:
            said.append(f"{name} reached")
        elif fast <= limit:
            said.append(f"{name} reached if products hide their own traffic")
        else:
            said.append(f"{name} missed by {100 * (fast / limit - 1):.1f} % at best")
    if not work.flops:
        return f"{said[0]} ({note})" if said else note
    return "; ".join([*said, f"would help: {note}"])


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 10e-3 else f"{seconds * 1e3:.1f}"


def between(work: Work, gpu: Gpu) -> str:
    ends = [milliseconds(work.seconds(gpu, exposed)) for exposed in (False, True)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def table(made: list[Row]) -> str:
    lines = [
        "| | products | GB in them | GB in kernels | launches | issue slots | H100, ms | H200, ms | target, ms "
        "| bar, ms | verdict, H100 | measured |",
        "|---|" + "--:|" * 9 + "---|---|",
    ]
    for row in made:
        work = row.work
        products = f"{len(work.flops)}, {sum(work.flops) / 1e12:.1f} TFLOP" if work.flops else ""
        inside = f"{work.of_products / 1e9:.1f}" if work.flops else ""
        kernels = work.of_kernels / 1e9
        cells = [
            row.what,
            products,
            inside,
            f"{kernels:.1f}" if kernels > 0.1 else f"{kernels:.3f}",
            str(work.launches),
        ]
        cells += [f"{100 * work.issue:.0f} %" if work.issue else "", between(work, H100), between(work, H200)]
        cells += ["" if limit is None else milliseconds(limit) for limit in (row.target, row.bar)]
        lines.append("| " + " | ".join([*cells, verdict(*row[1:]), UNMEASURED]) + " |")
    return "\n".join(lines)


def in_l2(work: Work, efficiency: float) -> float:
    """Seconds if row kernels read logits that the product has left in the L2 cache."""
    return sum(work.flops) / PRODUCT / efficiency + work.of_kernels / L2_RATE + LAUNCH * work.launches


def in_epilogue(n: int, d: int, v: int, share: float, stored: str) -> float:
    """Seconds of a product with the softmax in its epilogue, at a share of the library's rate without epilogue.

    ``stored`` is what it leaves for a gradient, as in STORES. Nothing hides the epilogue: the tensor cores wait for it,
    once for each of a multiprocessor's tiles.
    """
    rows, columns, warps = 128, 256, 8
    tiles = -(-n // rows) * -(-v // columns)
    special = min(1.0, n / tiles)
    per_scheduler = warps / SCHEDULERS
    issued = per_scheduler * (EPILOGUE + special * SPECIAL + STORES[stored])
    exponentials = 32 * warps * EXPONENTIALS / EXPONENTIALS_A_CYCLE
    cycles = FIRST_STEP + max(issued, exponentials)
    if stored == "probabilities":
        cycles += 2 * 2 * rows * columns / SHARED_A_CYCLE
    merged = 4 * 4 * n * -(-v // columns)
    return (
        2 * n * d * v / PRODUCT / share + -(-tiles // MULTIPROCESSORS) * cycles / CLOCK + 2 * merged / COPY + 2 * LAUNCH
    )


def fused(stored: str, whole: Work | None = None, part: Work | None = None, shape: tuple[int, int, int] = LLAMA) -> str:
    """Both ends, of ``whole`` with :func:`in_epilogue` in place of ``part`` of it.

    Gradients of probabilities read 2 bytes each, where ``whole`` reads 4 of logits, and the maxima of their tiles.
    """
    n, _, v = shape
    saved = (2 * n * v - 4 * n * v // 256) / COPY if stored == "probabilities" and whole else 0.0
    ends = []
    for share, exposed in zip(reversed(OWN_PRODUCT), (False, True), strict=True):
        rest = whole.seconds(H100, exposed) - part.seconds(H100, exposed) - saved if whole and part else 0.0
        ends.append(milliseconds(rest + in_epilogue(*shape, share, stored)))
    return " to ".join(ends)


def choices() -> str:
    """What was weighed at 8,192 x 4,096 x 131,072."""
    n, _, v = LLAMA
    forward, both, loss = (counted(call) for call in (linear(*LLAMA), linear(*LLAMA, backward=True), nll(*LLAMA)))
    # What a loss does until it has all log-probs, in one tile.
    scored = counted(linear(*LLAMA), FORWARD_ELEMENTS={"cuda": n * v})
    small = counted(linear(*LLAMA), FORWARD_ELEMENTS={"cuda": n * 1024})
    # 64 x 4 blocks of 128 x 256 on 132 multiprocessors.
    waves = 256 / (2 * MULTIPROCESSORS)
    again = counted(linear(*LLAMA, backward=True), kept_bytes=none_kept)
    before = Work(again.flops, again.of_products, again.of_kernels + 8 * n * v, again.launches + 4, again.tails)
    halves, parts = (counted(nll(*LLAMA), fused_bytes=lambda _, size=size: size) for size in (2**31, 2**27))
    found = [
        ("forward, tiles of 8,192 x 16,896 (the default)", between(forward, H100)),
        ("forward, tiles of 8,192 x 1,024, which stay in 50 MB of L2 cache", milliseconds(in_l2(small, waves))),
        ("forward, softmax in the product's epilogue (`fused_columns`)", fused("")),
        ("the same, probabilities stored for a gradient", fused("probabilities")),
        ("the same, logits stored for a gradient (of float16, or with a bias)", fused("logits")),
        ("both ways, float32 logits kept: 4.3 GB until the backward pass (the default)", between(both, H100)),
        ("both ways and `linear_nll`, softmax in the product's epilogue, probabilities kept: 2.1 GB",
         fused("probabilities", both, forward)),
        ("the same at 8,192 x 3,584 x 152,064, 2.5 GB (36.5 asked of `linear_nll`)",
         fused("probabilities", counted(linear(*QWEN, backward=True)), counted(linear(*QWEN)), QWEN)),
        ("both ways, softmax in the product's epilogue, float32 logits kept", fused("logits", both, forward)),
        ("both ways, logits computed again (where less than 13 GB are free)", between(again, H100)),
        ("both ways, logits computed again, gradients rounded in a pass of its own", between(before, H100)),
        ("`linear_nll`, one tile (the default of 80 GB)", between(loss, H100)),
        ("`linear_nll`, one tile, softmax in the product's epilogue (where 2.1 GB cannot be kept)",
         fused("logits", loss, scored)),
        ("`linear_nll`, tiles of 2 GiB", between(halves, H100)),
        ("`linear_nll`, tiles of 128 MiB", between(parts, H100)),
    ]  # fmt: skip
    return "\n".join(["| choice | H100, ms |", "|---|--:|", *(f"| {what} | {time} |" for what, time in found)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, nargs="?")
    page = parser.parse_args().page
    made = f"{table(rows())}\n\n{choices()}"
    if page is None:
        print(made)
        return
    text = page.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{rest.partition(MARKS[1])[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
