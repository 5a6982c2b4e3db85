"""What a trainer's maintainers ask of a head, with the test that holds it and a figure: docs/conformance.md.

    python bench/conformance.py [PAGE] [--tokens 256] [--width 576] [--vocabulary 49152]

Prints the table, or writes it between the two marks of PAGE. Figures are of the device that is there; the columns of
others stay as PAGE has them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from measure import DEVICE
from table import measured_on
from torch import Tensor

import prime_kernels as pk
from prime_kernels._bench import formulas
from prime_kernels._bench.timing import peak_bytes

MARKS = ("<!-- figures -->", "<!-- end of figures -->")
UNMEASURED = "not yet measured"
# Tokens of one of many calls.
PART = 37
OPS, NATIVE, DROP_INS = "tests/ops", "tests/native/test_linear_kernels.py", "tests/integrations"
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Sizes(NamedTuple):
    tokens: int
    width: int
    vocabulary: int


class Row(NamedTuple):
    what: str
    tests: tuple[str, ...]
    figure: Callable[[Sizes], str]


def head(sizes: Sizes, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden states, weight, ids) of log-probs as models have them: a few nats and more."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sizes.tokens, sizes.width, generator=generator)
    weight = torch.randn(sizes.vocabulary, sizes.width, generator=generator) * (3.0 / sizes.width**0.5)
    ids = torch.randint(sizes.vocabulary, (sizes.tokens,), generator=generator)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), ids.to(DEVICE)


def both(hidden: Tensor, weight: Tensor, ids: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return pk.linear_log_probs(hidden, weight, ids, with_entropy=True, **options)


def exact(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    log_p = (hidden.double() @ weight.double().T).log_softmax(-1)
    return log_p.gather(-1, ids[:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def gradients(call: Callable, leaves: tuple[Tensor, Tensor], ids: Tensor, which: int) -> tuple[Tensor, ...]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    upstream = torch.linspace(-1.0, 2.0, len(ids), device=DEVICE)
    output = call(*leaves, ids)[which]
    return torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def relative(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
    """The largest error of each tensor relative to its largest value."""
    return max(
        ((one.double() - other).abs().max() / other.abs().max()).item() for one, other in zip(got, want, strict=True)
    )


def gradient_error(which: int, dtype: torch.dtype = torch.float32) -> Callable[[Sizes], str]:
    def figure(sizes: Sizes) -> str:
        hidden, weight, ids = head(sizes, dtype)
        want = gradients(exact, (hidden.double(), weight.double()), ids, which)
        return f"{relative(gradients(both, (hidden, weight), ids, which), want):.1e} of the largest"

    return figure


def graph_difference(sizes: Sizes) -> str:
    """Of values and gradients of both outputs, from those of the call without the compiler."""
    hidden, weight, ids = head(sizes)

    def call(hidden: Tensor, weight: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = both(hidden, weight, ids)
        return 2.0 * logp, 2.0 * entropy

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    pairs = zip(compiled(hidden, weight, ids), call(hidden, weight, ids), strict=True)
    values = [(mine - want).abs().max().item() for mine, want in pairs]
    found = [
        relative(gradients(compiled, (hidden, weight), ids, which), gradients(call, (hidden, weight), ids, which))
        for which in (0, 1)
    ]
    return f"largest difference {max(values + found):.1e}, no graph break"


def error_of(name: str) -> Callable[[Sizes], str]:
    def figure(sizes: Sizes) -> str:
        hidden, weight, ids = head(sizes, KINDS[name])
        want = exact(hidden, weight, ids)[0]
        with torch.no_grad():
            mine = (pk.linear_log_probs(hidden, weight, ids).double() - want).abs().max().item()
            eager = (formulas.linear_log_probs(hidden, weight, ids).double() - want).abs().max().item()
        return f"{mine:.1e} nats (eager PyTorch {eager:.1e})"

    return figure


@torch.no_grad()
def same_bits(sizes: Sizes) -> str:
    """Tokens whose log-prob has the same bits in one call and in calls of a few."""
    hidden, weight, ids = head(sizes, torch.bfloat16)

    def share(call: Callable) -> str:
        parts = [call(h, weight, i) for h, i in zip(hidden.split(PART), ids.split(PART), strict=True)]
        return f"{(torch.cat(parts) == call(hidden, weight, ids)).float().mean().item():.0%}"

    return f"{share(pk.linear_log_probs)} of tokens (eager PyTorch {share(formulas.linear_log_probs)})"


def repeatable(sizes: Sizes) -> str:
    """Gradients of equal calls."""
    hidden, weight, ids = head(sizes, torch.bfloat16)
    first = gradients(both, (hidden, weight), ids, 0)
    again = [gradients(both, (hidden, weight), ids, 0) for _ in range(3)]
    same = all(torch.equal(*pair) for other in again for pair in zip(first, other, strict=True))
    return "equal in 4 of 4 calls" if same else "different"


@torch.no_grad()
def equal_ratio(sizes: Sizes) -> str:
    hidden, weight, ids = head(sizes, torch.bfloat16)
    one, other = pk.Head(hidden, weight), pk.Head(hidden.clone(), weight.clone())
    ratio = pk.linear_log_ratios(one, other, ids).log_ratio
    return f"{ratio.abs().max().item():.1f} at most"


def refused(sizes: Sizes) -> str:
    """Of the backends that cannot run here, explicit calls that say so."""
    hidden, weight, ids = head(Sizes(2, 4, 8))
    absent = [name for name, why in pk.available_backends().items() if why is not None]
    count = 0
    for name in absent:
        try:
            pk.linear_log_probs(hidden, weight, ids, backend=name)
        except pk.BackendUnavailable:
            count += 1
    return f"{count} of {len(absent)} absent backends refused"


def peak(backward: bool) -> Callable[[Sizes], str]:
    def figure(sizes: Sizes) -> str:
        hidden, weight, ids = (each.requires_grad_(each.is_floating_point()) for each in head(sizes, torch.bfloat16))

        def memory(call: Callable) -> str:
            def run() -> None:
                with torch.set_grad_enabled(backward):
                    result = call(hidden, weight, ids)
                    if backward:
                        torch.autograd.grad(result, (hidden, weight), torch.ones_like(result))

            run()
            found = peak_bytes(run, torch.device(DEVICE))
            return "unknown" if found is None else f"{found / 2**20:.1f} MiB"

        return f"{memory(pk.linear_log_probs)} (eager PyTorch {memory(formulas.linear_log_probs)})"

    return figure


ROWS = (
    Row(
        "gradient of log-probs alone, float32",
        (
            f"{OPS}/test_log_probs.py::test_gradient_of_one_output_alone",
            f"{NATIVE}::test_one_gradient_missing_and_one_result_used",
        ),
        gradient_error(0),
    ),
    Row(
        "gradient of the entropy alone, float32",
        (f"{NATIVE}::test_one_gradient_missing_and_one_result_used", f"{DROP_INS}/installed/test_verl.py::test_head"),
        gradient_error(1),
    ),
    Row(
        "gradient of log-probs alone, bfloat16",
        (f"{NATIVE}::test_values_and_gradients",),
        gradient_error(0, torch.bfloat16),
    ),
    Row(
        "one graph forward and backward, `fullgraph=True`",
        (
            f"{OPS}/test_compile.py::test_linear_log_probs_in_one_graph",
            f"{OPS}/test_compile.py::test_log_probs_in_one_graph",
            f"{OPS}/test_compile.py::test_linear_losses_and_ratios_in_one_graph",
        ),
        graph_difference,
    ),
    *(
        Row(
            f"error of log-probs, {name}",
            (f"{NATIVE}::test_values_and_gradients", f"{OPS}/test_log_probs.py::test_error_is_at_most_that_of_eager"),
            error_of(name),
        )
        for name in KINDS
    ),
    Row(
        "bits of a token whatever else is in the call",
        (f"{NATIVE}::test_a_token_has_the_same_bits_whatever_is_beside_it",),
        same_bits,
    ),
    Row(
        "bits of gradients in equal calls",
        (f"{OPS}/test_log_probs.py::test_is_bitwise_repeatable", f"{NATIVE}::test_gradients_have_the_same_bits"),
        repeatable,
    ),
    Row("log-ratio of equal heads", (f"{NATIVE}::test_equal_heads_give_a_ratio_of_exactly_zero",), equal_ratio),
    Row(
        "an explicit backend never falls back",
        (
            f"{OPS}/test_dispatch.py::test_argument_never_falls_back",
            f"{OPS}/test_dispatch.py::test_missing_extension_warns_once_and_runs_eager",
        ),
        refused,
    ),
    Row("memory forward, bfloat16", (f"{NATIVE}::test_scratch_memory_of_the_forward",), peak(False)),
    Row(
        "memory forward and backward, bfloat16",
        (f"{OPS}/test_linear_log_probs.py::test_logits_are_kept_where_they_are_few_and_a_gradient_is_wanted",),
        peak(True),
    ),
)


def cells(page: str) -> dict[str, list[str]]:
    """The figures [CPU, GPU] that a page has, by what they are of."""
    table = page.partition(MARKS[0])[2].partition(MARKS[1])[0]
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines()]
    return {line[0]: line[2:] for line in lines if len(line) == 4}


def table(sizes: Sizes, page: str) -> str:
    before = cells(page)
    lines = ["| | test | CPU | GPU |", "|---|---|---|---|"]
    for row in ROWS:
        figures = before.get(row.what, [UNMEASURED, UNMEASURED])
        figures[DEVICE == "cuda"] = row.figure(sizes)
        tests = ", ".join(f"`{test}`" for test in row.tests)
        lines.append(f"| {row.what} | {tests} | {' | '.join(figures)} |")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    what = f"{sizes.tokens} tokens, width {sizes.width}, vocabulary {sizes.vocabulary:,}"
    return "\n".join([*lines, "", f"{what}. {measured_on(device)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path, nargs="?")
    for name, default in zip(Sizes._fields, (256, 576, 49152), strict=True):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    text = "" if options.page is None else options.page.read_text(encoding="utf-8")
    made = table(Sizes(options.tokens, options.width, options.vocabulary), text)
    if options.page is None:
        print(made)
        return
    parts = re.split(f"(?<={MARKS[0]})|(?={MARKS[1]})", text)
    options.page.write_text(f"{parts[0]}\n\n{made}\n\n{parts[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
