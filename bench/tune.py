"""Searches the launch configuration of the Triton row kernels on the GPU that is there.

usage: python bench/tune.py [RESULTS.json]

The best of each dtype goes, by hand, into TUNED of prime_kernels/_triton/_launch_config.py: users never pay for
a search.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from prime_kernels._backends import RowGradient
from prime_kernels._bench.timing import timed
from prime_kernels._triton import rows as kernels
from prime_kernels._triton._launch_config import Tuning, choose

CANDIDATES = [
    Tuning(block_bytes, bytes_per_thread, num_stages)
    for block_bytes, bytes_per_thread, num_stages in itertools.product((8192, 16384, 32768), (32, 64, 128), (1, 2))
]
ROWS, VOCABULARY, SECONDS = 8192, 151936, 0.2


def sweep(
    rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device, candidates: Sequence[Tuning] = CANDIDATES
) -> Iterator[dict]:
    """Yield the rates of each candidate, in GB/s of the bytes that must move."""
    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    ids = torch.randint(vocabulary, (rows,), device=device)
    grad, out = torch.randn(rows, device=device), torch.empty_like(logits)
    for tuning in candidates:
        config = choose(rows, vocabulary, logits.element_size(), kernels.device_of(device), tuning)

        def forward(config=config):
            return kernels.token_log_probs([logits], ids, None, [1.0], False, config)

        lse = forward()[1][0]

        def backward(config=config, lse=lse):
            kernels.logits_gradient(logits, ids, None, RowGradient(lse, None, grad, None), 1.0, out, config=config)

        rates = {
            "forward": logits.nbytes / timed(forward, device, SECONDS).median,
            "backward": 2 * logits.nbytes / timed(backward, device, SECONDS).median,
        }
        rates = {name: round(rate / 1e9, 1) for name, rate in rates.items()}
        yield {"dtype": str(dtype), **vars(tuning), "num_warps": config.num_warps, **rates}


def main(target: Path | None) -> None:
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        for row in sweep(ROWS, VOCABULARY, dtype, torch.device("cuda")):
            print(row, flush=True)
            found.append(row)
    for dtype, which in itertools.product(("torch.bfloat16", "torch.float32"), ("forward", "backward")):
        best = max((row for row in found if row["dtype"] == dtype), key=lambda row: row[which])
        print(f"best {which} {dtype}: {best}")
    if target is not None:
        target.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
