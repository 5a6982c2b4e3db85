"""The tolerance table, packed inputs for hypothesis, and the code of Markdown pages."""

import random
import re
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor

from prime_kernels._backends import RowResults

# (absolute, relative) error against float64, by what was computed. Gradients come back in the dtype of the input.
TOLERANCES = {
    "golden": (1e-5, 1e-5),
    "float64": (1e-10, 1e-9),
    "packing": (1e-6, 1e-6),
    "sums": (1e-6, 1e-6),
    "logp": (4e-6, 2e-6),
    "grad.float32": (2e-6, 2e-5),
    "grad.bfloat16": (1e-5, 2**-7),
    "grad.float16": (1e-5, 2**-10),
}


def assert_close(kind: str, got: Tensor, want: Tensor | list | float, *, extent: float = 0.0) -> None:
    """Compare in float64 within the tolerance of ``kind``; infinities and NaN must agree.

    ``extent`` is the size of the float32 numbers the result is a difference of, such as the largest logit: their
    rounding, 2^-24 of it at each step, is allowed on top.
    """
    absolute, relative = TOLERANCES[kind]
    expected = torch.as_tensor(want, dtype=torch.float64)
    torch.testing.assert_close(
        got.detach().double(), expected, atol=absolute + 2**-22 * extent, rtol=relative, equal_nan=True
    )


def gradient_kind(dtype: torch.dtype) -> str:
    return f"grad.{str(dtype).removeprefix('torch.')}"


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


def uniform(count: int, seed: int, low: float, high: float) -> list[float]:
    source = random.Random(seed)
    return [source.uniform(low, high) for _ in range(count)]


def split(values: list, lengths: list[int]) -> list[list]:
    """Cut packed values into one list a segment."""
    parts, start = [], 0
    for length in lengths:
        parts.append(values[start : start + length])
        start += length
    return parts


lengths = st.lists(st.integers(0, 7), min_size=0, max_size=9)
gammas = st.one_of(st.sampled_from([0.0, 1.0, 1e-30, 0.5]), st.floats(0.0, 1.0))
seeds = st.integers(0, 2**31)
scales = st.sampled_from([1e-6, 1.0, 30.0, 1e6])


@st.composite
def groups(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """(response lengths, group sizes): ragged groups, groups of one, responses of no and of one token."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    responses = sum(sizes)
    return draw(st.lists(st.integers(0, 5), min_size=responses, max_size=responses)), sizes


def code_blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a Markdown text in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def run_page(page: Path, **names: object) -> dict[str, object]:
    """Run the Python of a Markdown page from top to bottom; the names that it leaves."""
    blocks = code_blocks(page.read_text(encoding="utf-8"), "python")
    assert blocks, f"{page} has no Python"
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), names)
    return names


class IdleRows:
    """Row kernels that do nothing, on tensors without data."""

    def token_log_probs(self, models, ids, mask, temperatures, with_entropy):
        found = torch.empty(1, len(ids), device=ids.device)
        return RowResults(found, found.clone(), None)

    def logits_gradient(self, *arguments, **options):
        pass
