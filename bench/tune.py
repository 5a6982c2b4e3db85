"""Searches launch configurations on the GPU that is there: of the product of a head with the softmax in its epilogue,
then of the Triton row kernels.

usage: python bench/tune.py [RESULTS.json]

The best go, by hand, into HEAD_CONFIGS and TUNED of prime_kernels/_triton/_launch_config.py: users never pay for a
search. The results are written after every configuration, the product's at the sizes of a library's tile among them.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from prime_kernels._backends import LinearHead, RowGradient
from prime_kernels._bench.timing import timed
from prime_kernels._triton import head
from prime_kernels._triton import rows as kernels
from prime_kernels._triton._launch_config import HEAD_CONFIGS, HeadConfig, Tuning, choose

CANDIDATES = [
    Tuning(block_bytes, bytes_per_thread, num_stages)
    for block_bytes, bytes_per_thread, num_stages in itertools.product((8192, 16384, 32768), (32, 64, 128), (1, 2))
]
HEADS = [
    *HEAD_CONFIGS.values(),
    *(HeadConfig(128, 256, 64, 8, 4, group, 1) for group in (8, 32)),
    HeadConfig(128, 256, 64, 8, 3, 16, 1),
    HeadConfig(256, 128, 64, 8, 4, 8, 1),
    HeadConfig(128, 256, 128, 8, 2, 16, 1),
    HeadConfig(64, 256, 64, 4, 2, 32, 2),
]
ROWS, VOCABULARY, WIDTH, HEAD_VOCABULARY, SECONDS = 8192, 151936, 4096, 131072, 0.2


def sweep_head(tokens: int, width: int, vocabulary: int, device: torch.device) -> Iterator[dict]:
    """Yield TFLOP/s of each configuration after those of a library's product.

    Those of log-probs alone ("scored"), with float32 logits stored, and with float16 probabilities.
    """
    hidden, weight = (torch.randn(n, width, device=device).bfloat16() for n in (tokens, vocabulary))
    of = LinearHead(hidden, weight, None, torch.randint(vocabulary, (tokens,), device=device), 1.0, False)
    logits, flops = torch.empty(tokens, vocabulary, device=device), 2 * tokens * width * vocabulary
    widest = max(config.block_columns for config in HEADS)
    q = torch.empty(tokens, -(-vocabulary // widest) * widest, dtype=torch.float16, device=device)[:, :vocabulary]

    def rate(call) -> float | str:
        try:
            return round(flops / timed(call, device, SECONDS).median / 1e12, 1)
        except Exception as error:  # too much shared memory, or what else a shape fails with
            return f"{type(error).__name__}: {str(error)[:200]}"

    part = logits[:, : vocabulary // 2]
    library = rate(lambda: [torch.mm(hidden, half.T, out_dtype=torch.float32, out=part) for half in weight.chunk(2)])
    yield {"kernel": "library product", "stored": library}
    for config in HEADS:
        yield {
            "kernel": "head",
            **vars(config),
            "scored": rate(lambda config=config: head.token_log_probs(of, True, config)),
            "stored": rate(lambda config=config: head.token_log_probs(of, True, config, logits)),
            "probabilities": rate(lambda config=config: head.token_log_probs(of, True, config, q=q)),
        }


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
        yield {"kernel": "rows", "dtype": str(dtype), **vars(tuning), "num_warps": config.num_warps, **rates}


def main(target: Path | None) -> None:
    found: list[dict] = []
    device = torch.device("cuda")
    dtypes = (torch.bfloat16, torch.float32)
    heads = [sweep_head(ROWS, WIDTH, HEAD_VOCABULARY, device)] if torch.cuda.get_device_capability() >= (9, 0) else []
    for row in itertools.chain(*heads, *(sweep(ROWS, VOCABULARY, dtype, device) for dtype in dtypes)):
        print(row, flush=True)
        found.append(row)
        if target is not None:
            target.write_text(json.dumps(found, indent=1) + "\n")
    for dtype, which in itertools.product(map(str, dtypes), ("forward", "backward")):
        best = max((row for row in found if row.get("dtype") == dtype), key=lambda row: row[which])
        print(f"best {which} {dtype}: {best}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
